"""Which commit of this code is running, and which commits trained a run."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ssl_vit.commands import ROOT

CODE = ("ssl_vit", "eval")  # what a result depends on, beside the settings that a run records


def commit_of(root: Path) -> str | None:
    """The commit that is checked out in this folder, with "-dirty" behind it if the code differs from it; None if the
    folder is not itself a checkout, or git is not installed."""
    if not (root / ".git").exists() or not shutil.which("git"):  # a package may lie in another project's checkout
        return None
    # without locks: `status` would else refresh the index, and refuse a commit that the user makes at that moment
    words = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--", *CODE]
    said = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False).stdout.splitlines()
    commit = next((line.split()[-1] for line in said if line.startswith("# branch.oid ")), "(initial)")
    changed = any(not line.startswith("#") for line in said)
    return None if commit == "(initial)" else f"{commit}-dirty" if changed else commit


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
