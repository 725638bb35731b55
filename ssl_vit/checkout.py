"""Which commit of this code is running, and which commits trained a run."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ssl_vit.commands import ROOT

CODE = ("ssl_vit", "eval")  # what a result depends on, beside the settings that a run records


def commit_of(root: Path) -> str | None:
    """The commit that is checked out in this folder, with "-dirty-" and a hash of what differs behind it if the code
    does; None if the folder is not itself a checkout, or git is not installed."""
    if not (root / ".git").exists() or not shutil.which("git"):  # a package may lie in another project's checkout
        return None
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
    if not commit:
        return None
    changed = _git(root, "diff", "HEAD", "--name-only", "-z", "--", *CODE)
    changed += _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE)
    if not changed:
        return commit
    found = hashlib.sha256()
    for name in sorted(changed.split(b"\0")[:-1]):
        file = root / os.fsdecode(name)
        found.update(name + b"\0" + (file.read_bytes() if file.is_file() else b"") + b"\0")
    return f"{commit}-dirty-{found.hexdigest()[:7]}"


def _git(root: Path, *words: str) -> bytes:
    # without locks: git would else refresh the index, and refuse a commit that the user makes at that moment
    return subprocess.run(["git", "--no-optional-locks", *words], cwd=root, capture_output=True, check=False).stdout


COMMIT = commit_of(ROOT)  # read when the code is loaded: the files may change before anything is written


def commits(settings: dict[str, Any], log: list[dict[str, Any]]) -> dict[int, str | None]:
    """{step: the commit that trained from that step on} of a run; None where none is recorded.

    settings: its recipe.yaml; log: the lines of its log.jsonl.
    """
    changes = [line for line in log if "commit" in line.get("runtime", {})]
    first = changes[0]["before"]["commit"] if changes else settings.get("runtime", {}).get("commit")
    return {0: first} | {line["step"]: line["runtime"]["commit"] for line in changes}


def in_words(commits: dict[int, str | None]) -> str:
    """What `commits` returns, as a part of a sentence.

    >>> in_words({0: "4d5d306", 500: "f4d7128"})
    '4d5d306, from step 500 on f4d7128'
    """
    first, *later = commits.items()
    return ", ".join([_said(first[1]), *(f"from step {step:,} on {_said(commit)}" for step, commit in later)])


def _said(commit: str | None) -> str:
    return commit or "no commit recorded"
