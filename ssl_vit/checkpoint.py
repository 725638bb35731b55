"""The run's state: one writer, whole checkpoints, a log that never runs ahead of them.

A checkpoint of one process is a file, step-00000500.pt; of several it is a folder of that name, written by all of them
while training goes on. One process has nobody to share the work with: a file is simpler, safe to read, and in place
before the next step. Either kind is read by any number of processes.
"""

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ssl_vit import commands, files, peers
from ssl_vit import recipe as recipes
from ssl_vit.devices import out_of_memory
from ssl_vit.errors import UserError

NAME = re.compile(r"step-(\d{8})(\.pt)?$")
PATIENCE = 20  # seconds that a failing run waits for the checkpoint that is being written


class Run:
    """A run directory. Only the first process calls the methods that write."""

    def __init__(self, path: Path):
        self.path = path
        self.log_file = path / "log.jsonl"
        self._lock: files.Lock | None = None

    # -- opening ------------------------------------------------------------------------------------------------------

    def enter(self, settings: dict[str, Any], config: type[Any], ledger: dict[str, Any]) -> None:
        """Become the only writer of a run with these settings and images. A finished one is only read, so that it may
        lie where nothing can be written.

        Raises UserError as `lock` and `claim` do.
        """
        if self.finished:
            self.claim(settings, config)
            return
        self.lock()
        self.claim(settings, config)
        files.write(self.path / "images.json", json.dumps(ledger, indent=1, ensure_ascii=False))

    def lock(self) -> None:
        """Become the only writer until the process ends. Raises UserError with the holder's pid and machine."""
        refusal = "wait for it, or pass another --output."
        lock = files.Lock(self.path / ".lock", wait=False, refusal=refusal, remedy="Choose another --output.")
        self._lock = lock.__enter__()
        for folder in (".", "checkpoints", "backbones"):  # of a process that was killed while it wrote
            for left in (self.path / folder).glob(f"*{files.PARTIAL}"):
                files.remove(left)

    def claim(self, settings: dict[str, Any], config: type[Any]) -> None:
        """Write recipe.yaml, or check that an existing one agrees wherever it must. config: the objective's Config.

        What changes under `runtime` when a run goes on, such as the commit or the device, is logged: recipe.yaml holds
        the latest alone.

        Raises UserError naming the keys that differ and, where there is one, the command that starts a separate run.
        """
        file = self.path / "recipe.yaml"
        if not file.exists():
            if any(not p.name.startswith(".lock") for p in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and holds no run: choose another --output.")
        else:
            old = recipes.read_settings(file)
            if not old.keys() >= recipes.ADDED:
                raise UserError(f"{file} is a recipe and not a run's: choose another --output.")
            keys = recipes.differences(old, settings, config)
            if keys and commands.current() != "pretrain":  # the user did not choose the folder
                raise UserError(
                    f"{self.path} is a run with other settings ({', '.join(keys)}): remove that folder, and start the "
                    "same command again."
                )
            if keys:
                free = next(f"{self.path}-{n}" for n in range(2, 1000) if not Path(f"{self.path}-{n}").exists())
                arguments = [a for a in sys.argv[1:] if not a.startswith("--output=")]
                if "--output" in arguments:
                    at = arguments.index("--output")
                    del arguments[at : at + 2]
                command = shlex.join([*commands.typed("pretrain"), *arguments, "--output", free])
                other = f"{self.path} is a run with other settings ({', '.join(keys)})."
                if "images.fingerprint" in keys:
                    other += " Its images differ (of photos the names, sizes or times of the files; cp -p keeps those)."
                if "resolved.given_weights" in keys:
                    other += " The weights that it starts or learns from have changed."
                raise UserError(f"{other} Start a new one: {command}")
            if not self.finished:
                self._log_changes(recipes.defaults()["runtime"] | old["runtime"], settings["runtime"])
        if not self.finished:
            files.write(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    @property
    def finished(self) -> bool:
        return (self.path / "backbone" / "config.json").exists()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self) -> dict[int, Path]:
        """{steps done: file or folder}, in order."""
        found = {int(m[1]): p for p in (self.path / "checkpoints").glob("*") if (m := NAME.search(p.name))}
        return dict(sorted(found.items()))

    @contextmanager
    def saving(self, step: int, suffix: str = "") -> Iterator[Path]:
        """A path beside the older checkpoint at which to write the state after `step` steps. When the block ends it is
        renamed into place, and the older checkpoint is deleted.

        Raises UserError if the disk is full; the older checkpoint then stays.
        """
        with files.writing(self._place(step, suffix), self._make_room()) as partial:
            yield partial
        for old, path in self.checkpoints().items():
            if old < step:
                files.remove(path)

    @contextmanager
    def helping(self, step: int) -> Iterator[Path]:
        """The same path for the other processes, while the first one is `saving`."""
        target = self._place(step)
        try:
            yield files.partial(target)
        except (OSError, RuntimeError) as error:
            raise files.cannot_write(target, error, self._make_room()) from None

    def _place(self, step: int, suffix: str = "") -> Path:
        return self.path / "checkpoints" / f"step-{step:08d}{suffix}"

    def _make_room(self) -> str:
        older = list(self.checkpoints())
        intact = f"The checkpoint of step {older[-1]} is intact" if older else "There is no earlier checkpoint"
        return f"{intact}. Make room and start the same command again."

    # -- the log ------------------------------------------------------------------------------------------------------

    def log(self, line: dict[str, Any]) -> None:
        files.append(self.log_file, json.dumps(line) + "\n")

    def _log_changes(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """A line with what differs, at the step from which the run goes on; none if it begins again."""
        done = max(self.checkpoints(), default=0)
        changed = {key: value for key, value in now.items() if before.get(key) != value}
        if done and changed:
            self.cut_log(done)  # a half-written line would swallow the new one
            self.log(dict(step=done, runtime=changed, before={key: before.get(key) for key in changed}))

    def read_log(self) -> list[dict[str, Any]]:
        """The lines logged, up to the first that is half written."""
        return files.read_lines(self.log_file)

    def cut_log(self, step: int) -> dict[str, Any]:
        """Drop lines logged after `step` or half written, and all if the run begins again. Returns the last remaining
        line that has seconds, or {}."""
        lines = [line for line in self.read_log() if step and line["step"] <= step]
        files.write(self.log_file, "".join(json.dumps(line) + "\n" for line in lines))
        return next((line for line in reversed(lines) if "seconds" in line), {})


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around code that reads a checkpoint. Raises UserError if it cannot be read."""
    try:
        yield
    except Exception as error:  # torch's readers raise a dozen types for a damaged file
        detail = " ".join(str(error).split())[:120]
        ran_out = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory(error))
        refused = isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError)
        if ran_out or refused:
            raise UserError(
                f"The checkpoint {path} cannot be read ({detail}): it may be whole. Mend that, and start the same "
                "command again."
            ) from None
        raise UserError(
            f"The checkpoint {path} is damaged ({detail}). Delete it to continue from an earlier one, or from the "
            "start."
        ) from None


class Saver:
    """Saves the state of training when it is due. All processes call it.

    write: given the steps done, writes the checkpoint, or returns what is still writing it. check: called with the
    steps done; raises UserError if their state must not be saved.
    """

    def __init__(
        self,
        write: Callable[[int], "Future[None] | None"],
        runtime: recipes.Runtime,
        check: Callable[[int], None],
        done: int,
    ):
        self.write, self.runtime, self.check = write, runtime, check
        self.saved, self._at = done, time.monotonic()  # steps done at the last checkpoint; its time
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """What was begun is finished; of several processes all must be there for that."""
        if error is None:
            self.settle()
        elif self._writing is not None and not peers.lost(error):
            wait([self._writing], PATIENCE)

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint is older than runtime.save_minutes."""
        minutes = self.runtime.save_minutes
        return minutes is not None and time.monotonic() - self._at >= 60 * minutes

    def save(self, step: int) -> None:
        """Save the state after `step` steps. Raises UserError if it must not be saved or cannot be written."""
        self.check(step)
        self.settle()
        self._writing = self.write(step)
        self.saved, self._at = step, time.monotonic()

    def look(self) -> None:
        """Raises UserError if what is still writing a checkpoint has failed."""
        if self._writing is not None and self._writing.done():
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint is written. Raises UserError if it cannot be."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None
