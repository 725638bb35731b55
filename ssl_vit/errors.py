"""A user's mistake is one clear sentence and a non-zero exit, never a traceback."""

import difflib
import functools
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something only the user can mend. The message names the thing and the remedy.

    sentences: one for each mistake. The message is the one, or a list of them all.
    """

    def __init__(self, *sentences: str):
        several = [f"{len(sentences)} mistakes:", *(f"- {sentence}" for sentence in sentences)]
        super().__init__(sentences[0] if len(sentences) == 1 else "\n".join(several))
        self.sentences = sentences


class Diverged(UserError):
    """A training whose loss or weights are no longer finite numbers."""


class Mistakes:
    """Gathers what is wrong, so that all of it is said at once: `with mistakes: …` goes on after a UserError."""

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
        """Raises one UserError for all there were, if there were any."""
        if self.sentences:
            raise UserError(*self.sentences)


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known word nearest to a misspelt one, or '' if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def listed(words: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main and exit; a UserError becomes its message on stderr and exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        code = 141
    sys.exit(code)


def say(text: str) -> None:
    """Tell the user, once: on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


say_once = functools.cache(say)
