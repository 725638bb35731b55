"""Deliberate faults that the tests must find.

    python tests/mutants/run.py              # all of them: some ten minutes on two idle cores
    python tests/mutants/run.py NAME …       # those whose names begin so

Each NAME.patch beside this file makes one fault in the code. The words above its first `diff` say what is wrong, and
`tests:` gives pytest's arguments that are to find it. The files of the working tree are copied to a scratch folder; the
named tests must pass there; then one patch after another is applied, its tests are run and it is taken back. A fault is
caught when a test fails; one that survives, does not apply any more, or ends pytest otherwise makes the exit code 1.

A new one: make the fault, then

    (echo 'What is wrong.'; echo 'tests: tests/test_x.py -k words'; git diff -U1) > tests/mutants/NAME.patch

and take it back. This runs when asked. The test suite only looks that every patch still applies.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass
class Mutant:
    """A fault: a patch, and the tests that must find it, as pytest's arguments."""

    file: Path
    what: str
    tests: list[str]

    @property
    def name(self) -> str:
        return self.file.stem


def read(file: Path) -> Mutant:
    """The mutant of a patch. Raises ValueError for one without a sentence, without tests or with tests that are not."""
    head = file.read_text().partition("diff --git")[0]
    what, _, tests = head.partition("tests:")
    words = shlex.split(tests)
    if not what.strip() or not words or not (ROOT / words[0]).is_file():
        raise ValueError(f"{file.name} must begin with a sentence and 'tests: tests/test_x.py …'.")
    return Mutant(file, " ".join(what.split()), words)


def everyone() -> list[Mutant]:
    return [read(file) for file in sorted(HERE.glob("*.patch"))]


def apply(mutant: Mutant, folder: Path, *options: str) -> str:
    """Apply the patch to the files in a folder; returns what git complains of, or ''."""
    # as to no repository at all, for git would leave out what its index does not know
    command = ["git", "-C", str(folder), "apply", "-C1", *options, str(mutant.file)]
    alone = os.environ | dict(GIT_CEILING_DIRECTORIES=str(folder.parent))
    result = subprocess.run(command, env=alone, capture_output=True, text=True)
    return "" if result.returncode == 0 else result.stderr.strip() or "git apply failed"


def copy(folder: Path) -> None:
    """Copy the working tree as it is: what git tracks, and what it does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def pytest(folder: Path, tests: list[str]) -> tuple[int, str]:
    """(pytest's exit code, the first test that failed)."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rf", *tests]
    own = os.environ | dict(PYTHONPATH=str(folder))
    result = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)
    failed = re.search(r"^FAILED tests/(test_\w+\.py::.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
    return result.returncode, failed[1] if failed else (result.stdout + result.stderr).strip()[-300:]


def main(names: list[str]) -> int:
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return 0
    mutants = [m for m in everyone() if not names or m.name.startswith(tuple(names))]
    if not mutants:
        print(f"There is no mutant {' or '.join(names)}. There are: {', '.join(m.name for m in everyone())}.")
        return 2
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        folder = Path(scratch) / "copy"
        folder.mkdir()
        copy(folder)
        for tests in {tuple(m.tests): None for m in mutants}:
            code, failed = pytest(folder, list(tests))
            if code:
                print(f"Without any fault `pytest {' '.join(tests)}` does not pass (exit {code}): {failed}")
                return 2
        print("| mutant | caught by | seconds |\n|---|---|---:|", flush=True)
        for mutant in mutants:
            started = time.perf_counter()
            verdict = apply(mutant, folder)
            if verdict:
                verdict = f"**does not apply**: {' '.join(verdict.split())}"
            else:
                code, failed = pytest(folder, mutant.tests)
                verdict = {0: "**survived**", 1: failed}.get(code, f"**pytest ended with {code}**: {failed}")
                if left := apply(mutant, folder, "--reverse"):
                    raise RuntimeError(f"{mutant.name} cannot be taken back: {left}")
            survived += verdict.startswith("**")
            print(f"| {mutant.name} | {verdict} | {time.perf_counter() - started:.0f} |", flush=True)
    print(f"\n{len(mutants) - survived} of {len(mutants)} caught.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
