"""Files are there whole or not at all; one process writes at a time."""

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from eval.compare import runs
from eval.measure import results
from ssl_vit import checkpoint, errors, files, teachers
from ssl_vit.errors import Busy, UserError


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with files.writing(target) as partial:
        partial.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one" and [p.name for p in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 5")])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "a.txt"
    files.write(target, "one")
    with pytest.raises(UserError, match=r"^Cannot write .*a.txt \((No space left on device|unexpected pos 5)\). Buy."):
        with files.writing(target, "Buy a disk.") as partial:
            partial.write_text("tw")
            raise error
    assert target.read_text() == "one" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_may_be_told_by_fsync_alone(tmp_path, monkeypatch):
    files.write(tmp_path / "a", "one")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.write(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"


def test_a_folder_replaces_a_folder(tmp_path):
    for content in ("one", "two"):
        with files.writing(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "two"]


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.writing(tmp_path / "a") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_appended_is_cut_off_again(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    files.append(log, "one\n")

    class Full:  # room for three more bytes, as write(2) has it
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def write(self, data):
            with log_open(log, "ab") as stream:
                stream.write(data[:3])
            full()

    log_open = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: Full())
    with pytest.raises(UserError, match="log.jsonl"):
        files.append(log, "second\n")
    monkeypatch.undo()
    assert log.read_text() == "one\n"


def test_a_log_is_read_up_to_the_line_that_is_half_written(tmp_path):
    """As it is while the run goes on, or after a kill; whoever reads it."""
    run = tmp_path / "run"
    run.mkdir()
    assert files.read_lines(run / "log.jsonl") == [] and results.spent(run)["images"] == 0
    (run / "recipe.yaml").write_text("train: {seed: 0}\n")
    (run / "results.jsonl").write_text('{"run": "run"}\n')
    (run / "log.jsonl").write_text('{"step": 1, "images": 8, "flops": 2.0, "seconds": 3.0}\n{"step": 2, "ima')
    assert results.spent(run) == dict(images=8, flops=2.0, seconds=3.0)
    assert teachers.cost(str(run)) == {str(run.resolve()): 2.0}
    assert len(runs.read_run(run).log) == len(checkpoint.Run(run).read_log()) == 1


def hold(file: Path, held, release) -> None:
    with files.Lock(file):
        held.set()
        release.wait(60)


def test_the_holder_of_a_lock_is_named(tmp_path):
    held, release = multiprocessing.Event(), multiprocessing.Event()
    child = multiprocessing.Process(target=hold, args=(tmp_path / ".lock", held, release))
    child.start()
    try:
        assert held.wait(60)
        with pytest.raises(Busy, match=rf"being written by process {child.pid} on .*: pass another --output"):
            files.Lock(tmp_path / ".lock", wait=False, refusal="pass another --output.").__enter__()
        (tmp_path / ".lock.holder").write_text("7 on another")
        with pytest.raises(Busy, match=rf"process 7 on another: .* If it is gone, delete {tmp_path / '.lock'}"):
            files.Lock(tmp_path / ".lock", wait=False).__enter__()
    finally:
        release.set()
        child.join()
    with files.Lock(tmp_path / ".lock", wait=False):
        assert (tmp_path / ".lock.holder").read_text().startswith(str(os.getpid()))


def test_who_waits_for_a_lock_says_for_whom(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    held, release = multiprocessing.Event(), multiprocessing.Event()
    child = multiprocessing.Process(target=hold, args=(tmp_path / ".lock", held, release))
    child.start()
    assert held.wait(60)
    monkeypatch.setattr(files, "say", lambda text: (print(text), release.set()))
    with files.Lock(tmp_path / ".lock"):
        assert (tmp_path / ".lock.holder").read_text().startswith(str(os.getpid()))
    assert f"{tmp_path} is being written by process {child.pid} on" in capsys.readouterr().out
    child.join()


def test_what_a_killed_process_left_half_written_goes_with_the_next_start(tmp_path):
    for name in ("checkpoints/step-00000008.pt.partial", "backbones/step-00000004.partial/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "checkpoints/step-00000007.pt").write_text("whole")
    checkpoint.Run(tmp_path).lock()
    assert [p.name for p in tmp_path.rglob("*") if "step" in p.name] == ["step-00000007.pt"]


def test_a_closed_terminal_hears_nothing(monkeypatch):
    def closed(*arguments, **more):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(errors, "print", closed, raising=False)
    errors.say("Stopped after step 3.")


def test_a_killed_holder_gives_the_lock_free(tmp_path):
    held, release = multiprocessing.Event(), multiprocessing.Event()
    child = multiprocessing.Process(target=hold, args=(tmp_path / ".lock", held, release))
    child.start()
    assert held.wait(60)
    child.kill()
    child.join()
    with files.Lock(tmp_path / ".lock", wait=False):
        pass
