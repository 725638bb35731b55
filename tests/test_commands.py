"""Commands forked from a process that has their imports: as if each were started from the terminal."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import environment, until

from eval.schedule import processes


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a module of this text in the test's folder, which gets its log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(name, text, *arguments, **variables):
        (tmp_path / f"{name}.py").write_text(text)
        return processes.Command(name, [f"{name}.py", *arguments], Path(f"{name}.txt"), variables)

    return call


def test_a_script_is_as_from_the_terminal(start, tmp_path, monkeypatch):
    monkeypatch.setenv("GIVEN", "before")
    Path("command.txt").write_text("$ command\n")
    text = """
import multiprocessing, os, sys
def main():
    print(sys.argv, os.getcwd(), os.environ["GIVEN"], os.environ["MORE"])
    os.system("echo of a child")
    print("eval.knn" in sys.modules, multiprocessing.get_start_method(), file=sys.stderr)
    return 3
"""
    command = start("command", text, "a b", "--c", MORE="1")
    assert command.wait() == command.poll() == 3
    assert sorted(Path("command.txt").read_text().splitlines()) == sorted(
        [
            "$ command",
            f"['command.py', 'a b', '--c'] {tmp_path} before 1",
            "of a child",
            f"True {multiprocessing.get_start_method()}",  # True: it was prepared
        ]
    )
    assert "MORE" not in os.environ


def test_a_script_loads_images_in_processes_of_its_own(start):
    text = """
from torch.utils.data import DataLoader
def main():
    found = list(DataLoader(range(6), batch_size=2, num_workers=2, collate_fn=sum))
    assert found == [1, 5, 9], found
"""
    assert start("loads", text).wait() == 0, Path("loads.txt").read_text()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("from ssl_vit.errors import UserError; raise UserError('a sentence')", 2, "error: a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import nothing_of_that_name", 1, "nothing_of_that_name"),
    ],
)
def test_what_fails_says_why(words, code, said, start):
    assert start("fails", f"def main():\n    print('begun')\n    {words}\n").wait() == code
    assert "begun" in Path("fails.txt").read_text() and said in Path("fails.txt").read_text()


SLOW = """
import signal, sys, time
def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    print("on", flush=True)
    time.sleep(100)
"""


def test_it_is_stopped_by_its_own_handler_and_alone(start):
    first = start("first", SLOW)
    until(lambda: "on" in (Path("first.txt").read_text() if Path("first.txt").exists() else ""))
    assert first.poll() is None
    second = start("second", "import time\ndef main():\n    time.sleep(1)\n")
    first.stop()
    assert first.wait() == 7 and second.wait() == 0
    killed = start("killed", "import os, signal\ndef main():\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert killed.wait() == -signal.SIGKILL


def test_it_is_stopped_when_the_one_who_would_stop_it_is_killed(tmp_path):
    """Else a study that is started again would meet its own commands."""
    (tmp_path / "slow.py").write_text(SLOW.replace("sys.exit(7)", "(print('stopped', flush=True), sys.exit(7))"))
    (tmp_path / "study.py").write_text("""
import time
from pathlib import Path
from eval.schedule.processes import Command
if __name__ == "__main__":
    command = Command("slow", ["slow.py"], Path("slow.txt"), {})
    time.sleep(100)
""")
    process = subprocess.Popen([sys.executable, "study.py"], cwd=tmp_path, env=environment())

    def said():
        return (tmp_path / "slow.txt").read_text() if (tmp_path / "slow.txt").exists() else ""

    until(lambda: "on" in said())
    process.kill()
    process.wait()
    until(lambda: "stopped" in said())


def test_a_signal_to_the_whole_group_leaves_the_one_who_tells_how_commands_end(tmp_path):
    """As `timeout 8h python eval/study.py …` sends it: the study waits until its commands have saved."""
    (tmp_path / "slow.py").write_text(SLOW.replace("sys.exit(7)", "(time.sleep(1), sys.exit(7))"))
    (tmp_path / "study.py").write_text("""
import os, signal, time
from pathlib import Path
from eval.schedule.processes import Command
def stop(*_):
    command.stop()
    print("ended with", command.wait(), flush=True)
    os._exit(0)
if __name__ == "__main__":
    command = Command("slow", ["slow.py"], Path("slow.txt"), {})
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    Path("ready").touch()
    time.sleep(100)
""")
    process = subprocess.Popen(
        [sys.executable, "study.py"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: "on" in ((tmp_path / "slow.txt").read_text() if (tmp_path / "slow.txt").exists() else ""))
    until((tmp_path / "ready").exists)
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=120)[0] == "ended with 7\n"


def test_what_is_prepared_has_not_touched_a_gpu():
    """A process forked from one that has cannot use it."""
    text = f"""
import importlib, torch
def refuse(*_): raise AssertionError("the GPU was asked for")
torch._C._cuda_getDeviceCount = torch._C._cuda_init = refuse
for name in {processes.PREPARED}: importlib.import_module(name)
try: torch.cuda.is_available()
except AssertionError: print("asked for only now")
"""
    done = subprocess.run([sys.executable, "-c", text], env=environment(), capture_output=True, text=True)
    assert done.stdout == "asked for only now\n", done.stderr
