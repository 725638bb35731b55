"""Start our scripts without the seconds that imports take.

    from eval.schedule.processes import Command
    command = Command("eval.knn", ["eval/knn.py", "--backbone", "runs/x"], log=Path("log.txt"), environment={})

Each is a process of its own, forked from multiprocessing's fork server. The server has imported what the scripts import
and done nothing else: it has computed nothing, holds no lock and has not touched a GPU. So all commands of a study run
the code that was there when it began. On macOS, where a process with these libraries must not be forked, each command
starts from scratch.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

from eval.schedule.plans import EVALUATORS
from ssl_vit import errors, system
from ssl_vit.commands import ROOT

OBJECTIVES = ROOT / "ssl_vit" / "objectives"  # the loop imports them by name
PREPARED = ["ssl_vit.pretrain", *(f"ssl_vit.objectives.{file.stem}" for file in sorted(OBJECTIVES.glob("[a-z]*.py")))]
PREPARED += [*(f"eval.{name}" for name in EVALUATORS), "eval.study", "sklearn.linear_model"]

if sys.platform == "darwin":
    _context = multiprocessing.get_context("spawn")
else:
    _context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PREPARED)


class Command:
    """A running main() of a module, in a session of its own: what is typed in the terminal does not reach it.

    words: the script and its arguments. log: the file that its output is appended to. environment: variables added to
    this process's own.
    """

    def __init__(self, module: str, words: list[str], log: Path, environment: dict[str, str]):
        variables = os.environ | environment
        self._process = _context.Process(target=_run, args=(module, words, log.resolve(), Path.cwd(), variables))
        # The server ignores signals to stop, which may be sent to both: it is what reports how the commands end.
        resource_tracker.ensure_running()  # multiprocessing's: started later, it would unblock the signals here
        before = signal.pthread_sigmask(signal.SIG_BLOCK, system.STOPPING)
        if _context.get_start_method() == "forkserver":
            forkserver.ensure_running()
        self._process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def stop(self) -> None:
        """Tell it to stop."""
        self._process.terminate()

    def wait(self) -> int | None:
        """Its exit code, once it has ended."""
        self._process.join()
        return self._process.exitcode


def _stop_with(parent: BaseProcess) -> None:
    """If the one that tells it to stop is killed, nobody would: a study that is started again would meet its own
    commands."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(module: str, words: list[str], log: Path, folder: Path, variables: dict[str, str]) -> None:
    os.setsid()
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, system.STOPPING)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_stop_with, args=(parent,), daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # it starts processes as if run from the terminal
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = words
    errors.run(importlib.import_module(module).main)
