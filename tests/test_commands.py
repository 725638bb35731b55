"""Commands forked from a process that has their imports: as if each were started from the terminal."""

import os
import signal
import subprocess
import sys

import pytest
from test_loop import environment, until

from eval import commands


def started(folder, text, *arguments, **variables):
    (folder / "script.py").write_text(text)
    words = [sys.executable, str(folder / "script.py"), *arguments]
    return commands.Command(words, folder / "log.txt", variables)


def test_a_script_is_as_from_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIVEN", "before")
    (tmp_path / "log.txt").write_text("$ command\n")
    text = "import os, sys\nprint(__name__, sys.argv[1:], os.getcwd(), os.environ['GIVEN'], os.environ['MORE'])\n"
    text += "os.system('echo of a child')\nprint('eval.knn' in sys.modules, file=sys.stderr)\nsys.exit(3)\n"
    command = started(tmp_path, text, "a b", "--c", MORE="1")
    assert command.wait() == command.poll() == 3
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert sorted(lines) == sorted(
        ["$ command", f"__main__ ['a b', '--c'] {tmp_path} before 1", "of a child", "True"]  # True: it was prepared
    )
    assert "MORE" not in os.environ


@pytest.mark.parametrize("words", ["raise SystemExit('a sentence')", "1 / 0", "import nothing_of_that_name"])
def test_what_fails_says_why(words, tmp_path):
    assert started(tmp_path, f"print('begun')\n{words}\n").wait() == 1
    said = (tmp_path / "log.txt").read_text()
    assert "begun" in said and any(text in said for text in ("a sentence", "ZeroDivisionError", "nothing_of_that_name"))


def test_it_is_stopped_by_its_own_handler_and_alone(tmp_path):
    text = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint('on', flush=True)\n"
    first = started(tmp_path, text + "time.sleep(100)")
    until(lambda: (tmp_path / "log.txt").exists() and "on" in (tmp_path / "log.txt").read_text())
    assert first.poll() is None
    (tmp_path / "second").mkdir()
    second = started(tmp_path / "second", "import time\ntime.sleep(2)")
    first.stop()
    assert first.wait() == 7 and second.wait() == 0
    killed = started(tmp_path / "second", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert killed.wait() == -signal.SIGKILL


def test_what_is_prepared_has_not_touched_a_gpu():
    """A process forked from one that has cannot use it."""
    text = f"""
import importlib, torch
def refuse(*_): raise AssertionError("the GPU was asked for")
torch._C._cuda_getDeviceCount = torch._C._cuda_init = refuse
for name in {commands.PREPARED}: importlib.import_module(name)
try: torch.cuda.is_available()
except AssertionError: print("asked for only now")
"""
    done = subprocess.run([sys.executable, "-c", text], env=environment(), capture_output=True, text=True)
    assert done.stdout == "asked for only now\n", done.stderr
