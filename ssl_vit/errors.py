"""A user's mistake is one clear sentence and a non-zero exit, never a traceback."""

import difflib
import errno
import functools
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from ssl_vit import imports, peers

BUSY = 75  # the exit code after Busy: sysexits.h's EX_TEMPFAIL, for what may be tried again
# of paths: no right to enter a folder, a link to itself, a name that is too long, a server that is gone
REFUSED = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE)


class UserError(Exception):
    """Something only the user can mend. The message names the thing and the remedy.

    sentences: one for each mistake. The message is the one, or a list of them all.
    """

    def __init__(self, *sentences: str):
        several = [f"{len(sentences)} mistakes:", *(f"- {sentence}" for sentence in sentences)]
        super().__init__(sentences[0] if len(sentences) == 1 else "\n".join(several))
        self.sentences = sentences


class Busy(UserError):
    """A folder that another process is writing: what was asked for can be done when that one has ended."""


class Diverged(UserError):
    """A training whose loss or weights are no longer finite numbers."""


class NothingHeldOut(UserError):
    """A set that is not divided for reports, since none of its few images is in the tenth."""


class Mistakes:
    """Collects mistakes, so that all are reported at once: `with mistakes: …` continues after a UserError."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, UserError):
            self.sentences += error.sentences
            return True
        return False

    def refuse(self) -> None:
        """Raise one UserError for all mistakes, if there are any."""
        if self.sentences:
            raise UserError(*self.sentences)


def require(fits: bool, sentence: str) -> None:
    """Raises ValueError with the sentence unless it fits: for the arguments of functions that others call."""
    if not fits:
        raise ValueError(sentence)


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word nearest to a misspelt one, or '' if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def plural(count: int, noun: str) -> str:
    """ "1 seed", "1,797 seeds"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def run(main: Callable[[], int | None]) -> None:
    """Import what `--import` names, run a script's main and exit; a UserError becomes its message on stderr and exit
    code 2, or BUSY after Busy. So does a path that the system refuses, wherever it does.

    Of several processes the first that fails speaks for all, and each ends at once: what is left undone may wait for
    one that has gone.
    """
    message = ""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a terminal's encoding lacks a letter
    sys.argv[1:] = map(_at_home, sys.argv[1:])
    try:
        if peers.strangers():
            raise UserError(peers.introduction())
        sys.argv[1:] = imports.load(sys.argv[1:])
        code = main() or 0
    except (UserError, imports.NotFound) as error:
        message, code = f"error: {error}", BUSY if isinstance(error, Busy) else 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        code = 141
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
            message = f"error: {error.filename} cannot be used ({error.strerror}): mend that, or name another path."
            code = 2
        elif peers.several():
            message, code = peers.message(error), peers.LOST_CODE if peers.lost(error) else 1
        else:
            raise
    if message and peers.failed_first():
        print(f"\n{message}" if peers.several() else message, file=sys.stderr)  # below the first one's progress bar
    if code in (1, 2, BUSY, peers.LOST_CODE) and peers.several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _at_home(argument: str) -> str:
    """KEY=~/PATH with the home folder: shells replace a ~ at the beginning of a word alone."""
    key, equals, value = argument.partition("=")
    return f"{key}={os.path.expanduser(value)}" if equals and value.startswith("~/") else argument


def say(text: str) -> None:
    """Tell the user, once: on the first process only. A terminal that has been closed hears nothing."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(text, flush=True)
        except OSError as error:
            if error.errno != errno.EIO:
                raise


say_once = functools.cache(say)
