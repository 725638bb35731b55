"""The run's state: one writer, whole checkpoints, a log that never runs ahead of them."""

import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from ssl_vit import commands, files
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

KEEP = re.compile(r"step-(\d{8})\.pt$")


class Run:
    """A run directory. Only the first process calls the methods that write."""

    def __init__(self, path: Path):
        self.path = path
        self.log_file = path / "log.jsonl"
        self._lock: files.Lock | None = None

    # -- opening ------------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Become the only writer until the process ends. Raises UserError with the holder's pid and machine."""
        refusal = "wait for it, or pass another --output."
        lock = files.Lock(self.path / ".lock", wait=False, refusal=refusal, remedy="Choose another --output.")
        self._lock = lock.__enter__()

    def claim(self, settings: dict[str, Any], config: type[Any]) -> None:
        """Write recipe.yaml, or check that an existing one agrees wherever it must. config: the objective's Config.

        Raises UserError naming the keys that differ and, where there is one, the command that starts a separate run.
        """
        file = self.path / "recipe.yaml"
        if not file.exists():
            if any(not p.name.startswith(".lock") for p in self.path.iterdir()):
                raise UserError(f"{self.path} is not empty and holds no run: choose another --output.")
        else:
            old = recipes.read_settings(file)
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
                raise UserError(f"{other} Start a new one: {command}")
        if not self.finished:
            files.write(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))

    @property
    def finished(self) -> bool:
        return (self.path / "backbone" / "config.json").exists()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self) -> dict[int, Path]:
        """{steps done: file}, in order."""
        found = {int(m[1]): p for p in (self.path / "checkpoints").glob("*.pt") if (m := KEEP.search(p.name))}
        return dict(sorted(found.items()))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps beside the older checkpoint, rename it into place, delete the older one.

        Raises UserError if the disk is full; the older checkpoint then stays.
        """
        file = self.path / "checkpoints" / f"step-{step:08d}.pt"
        older = list(self.checkpoints())
        intact = f"The checkpoint of step {older[-1]} is intact" if older else "There is no earlier checkpoint"
        with (
            files.writing(file, f"{intact}. Make room and start the same command again.") as partial,
            open(partial, "wb") as stream,
        ):
            torch.save(state, stream)
        for old, path in self.checkpoints().items():
            if old < step:
                path.unlink()

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """(steps done, state) of the newest checkpoint, or None. Raises UserError if it cannot be read."""
        found = self.checkpoints()
        if not found:
            return None
        step, file = list(found.items())[-1]
        try:
            return step, torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's readers raise a dozen types for a damaged file
            detail = " ".join(str(error).split())[:120]
            raise UserError(
                f"The checkpoint {file} is damaged ({detail}). Delete it to continue from an earlier one, or "
                "from the start."
            ) from None

    # -- the log ------------------------------------------------------------------------------------------------------

    def log(self, line: dict[str, Any]) -> None:
        files.append(self.log_file, json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines logged, up to the first that is half written."""
        lines: list[dict[str, Any]] = []
        if self.log_file.exists():
            for text in self.log_file.read_text().splitlines():
                try:
                    lines.append(json.loads(text))
                except json.JSONDecodeError:
                    break
        return lines

    def cut_log(self, step: int) -> dict[str, Any]:
        """Drop lines logged after `step` or half written. Returns the last remaining line that has seconds, or {}."""
        lines = [line for line in self.read_log() if line["step"] <= step]
        files.write(self.log_file, "".join(json.dumps(line) + "\n" for line in lines))
        return next((line for line in reversed(lines) if "seconds" in line), {})


class Saver:
    """Saves the state of training when it is due. All processes call it, and the first one writes.

    state: gives it, in the form of one process. check: called with the steps done; raises UserError if their state
    must not be saved.
    """

    def __init__(
        self,
        run: Run,
        state: Callable[[], dict[str, Any]],
        runtime: recipes.Runtime,
        check: Callable[[int], None],
        done: int,
        writes: bool,
    ):
        self.run, self.state, self.runtime = run, state, runtime
        self.check, self.writes = check, writes
        self.saved, self._at = done, time.monotonic()  # steps done at the last checkpoint; its time

    @property
    def overdue(self) -> bool:
        """Whether the last checkpoint is older than runtime.save_minutes."""
        minutes = self.runtime.save_minutes
        return minutes is not None and time.monotonic() - self._at >= 60 * minutes

    def save(self, step: int) -> None:
        """Save the state after `step` steps. Raises UserError if it must not be saved or cannot be written."""
        self.check(step)
        state = self.state()
        if self.writes:
            self.run.save(step, state)
        self.saved, self._at = step, time.monotonic()
