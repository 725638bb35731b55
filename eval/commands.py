"""Start Python scripts without the seconds that their imports take.

    from eval.commands import Command
    command = Command([sys.executable, "eval/knn.py", "--backbone", "runs/x"], log=Path("log.txt"), environment={})

Each is a process of its own, forked from multiprocessing's fork server, which has imported what they import and done
nothing else: it has computed nothing, holds no lock and has not touched a GPU.
"""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

PREPARED = ["ssl_vit.pretrain", "eval.knn", "eval.linear_probe", "eval.finetune", "eval.robustness", "eval.difficulty"]
PREPARED += ["sklearn.linear_model"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PREPARED)


class Command:
    """A script that runs, in a session of its own: what is typed in the terminal does not reach it.

    words: the interpreter (this one), the script and its arguments. log: what it says is added there.
    environment: variables beside this process's own.
    """

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]):
        variables = os.environ | environment
        self._process = _context.Process(target=_run, args=(words[1:], log.resolve(), Path.cwd(), variables))
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def stop(self) -> None:
        """Tell it to stop."""
        self._process.terminate()

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode


def _run(words: list[str], log: Path, folder: Path, variables: dict[str, str]) -> None:
    os.setsid()
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
