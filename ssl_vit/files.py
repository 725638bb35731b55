"""Files that exist whole or not at all, and folders with one writer at a time.

    with files.writing(path) as partial, open(partial, "wb") as stream:
        torch.save(state, stream)                  # any library, any format; `path` appears when the block ends
    with files.Lock(folder / ".lock"): ...         # waits; wait=False refuses, naming the process that holds it

Everything that this project keeps is written through this file, so that a full, read-only or vanished disk gives one
sentence everywhere, and never a half-written file.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from ssl_vit.errors import Busy, UserError, say

PATIENCE = 10  # seconds that a lock is waited for without a word
PARTIAL = ".partial"  # the end of the name of what is not whole
ROOM = "Make room, or choose another place, and start the same command again."


@contextmanager
def writing(target: Path, remedy: str = ROOM) -> Iterator[Path]:
    """A path beside `target` to write to, a file or a folder, which takes its place when the block ends.

    Parent folders are made. Raises UserError, naming the target, the reason and the remedy, if it cannot be written;
    the earlier content then stays, and nothing is left beside it.
    """
    beside = partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(beside)
        yield beside
        _sync(beside)
        if target.is_dir():  # a folder cannot be replaced by another in one step
            remove(target)
        os.replace(beside, target)
    # torch and safetensors raise errors of their own for a full disk
    except (OSError, RuntimeError, SafetensorError) as error:
        raise cannot_write(target, error, remedy) from None
    finally:
        remove(beside)


def partial(target: Path) -> Path:
    """Where the content of `target` is written to."""
    return target.with_name(f"{target.name}{PARTIAL}")


def write(target: Path, content: str | bytes, remedy: str = ROOM) -> None:
    """The file with this content, whole or not at all. Raises UserError as `writing`."""
    with writing(target, remedy) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def append(target: Path, text: str) -> None:
    """Add text to a file's end. Raises UserError if it cannot be written; the file then ends as it did before."""
    before = target.stat().st_size if target.exists() else 0
    try:
        with open(target, "ab") as stream:
            stream.write(text.encode())
    except OSError as error:
        if target.exists():
            os.truncate(target, before)
        raise cannot_write(target, error) from None


def read_lines(target: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that grows, up to the first that is half written; none if there is no file."""
    lines: list[dict[str, Any]] = []
    for text in target.read_text(encoding="utf-8").splitlines() if target.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cannot_write(target: Path, error: Exception, remedy: str = ROOM) -> UserError:
    """The error of a file that cannot be written."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"Cannot write {target} ({reason.rstrip('.')}). {remedy}")


class Lock:
    """One process at a time, until the block or the process ends; a file beside the lock holds its pid and machine.

    Raises UserError if the folder cannot be written; with wait=False Busy if another process holds the lock, naming it:
    `refusal` then follows "FOLDER is being written by process PID on MACHINE: ".
    """

    def __init__(self, file: Path, wait: bool = True, refusal: str = "wait for it.", remedy: str = ROOM):
        self.file, self.refusal, self.remedy = file, refusal, remedy
        self.holder = file.with_name(f"{file.name}.holder")
        self.wait = wait
        self._lock = filelock.FileLock(file, thread_local=False)

    def __enter__(self) -> "Lock":
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=PATIENCE if self.wait else 0)
            except filelock.Timeout:
                holder = (
                    f"process {self.holder.read_text(encoding='utf-8')}" if self.holder.exists() else "another process"
                )
                held = f"{self.file.parent} is being written by {holder}"
                if not self.wait:
                    raise Busy(f"{held}: {self.refusal}{self._elsewhere(holder)}") from None
                say(f"{held}: waiting for it.")
                self._lock.acquire()
            self.holder.write_text(f"{os.getpid()} on {platform.node()}", encoding="utf-8")
        except OSError as error:
            self._lock.release()
            raise cannot_write(self.file.parent, error, self.remedy) from None
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def _elsewhere(self, holder: str) -> str:
        """What else helps if the holder is on another machine: some file systems keep the lock of one that is gone."""
        return "" if holder.endswith(f" on {platform.node()}") else f" If it is gone, delete {self.file}."


def fingerprint(value: object, digits: int = 6) -> str:
    """The first hex digits of the SHA-256 of a value that JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):  # the latter where its folder is a file
            path.unlink()


def _sync(path: Path) -> None:
    """Wait until the bytes are on the disk: a full disk or quota may be reported only then."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
