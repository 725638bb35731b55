"""A user's mistake: one sentence that names the thing and the remedy, exit code 2, no traceback."""

import errno
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from test_loop import ROOT, environment

from ssl_vit import data, engine, errors, files, pretrain
from ssl_vit import recipe as recipes

TINY = ["backbone.embed_dim=16", "backbone.depth=1", "backbone.num_heads=2", "monitor.trackers=none"]
TINY += ["runtime.num_threads=1", "runtime.num_workers=0"]


def save(path: str, seed: int = 0, side: int = 8, count: int = 1) -> None:
    """PNGs of noise; path may hold {i}."""
    for i in range(count):
        file = Path(path.format(i=i))
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed + i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs pretrain's main in an empty folder; returns (exit code, what it said on stdout and stderr)."""
    monkeypatch.chdir(tmp_path)
    errors.say_once.cache_clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def main(*arguments: str, recipe: str = "mae") -> tuple[int, str, str]:
        settings = ["--recipe", recipe, "train.batch_size=8", "train.steps=1", *TINY]
        monkeypatch.setattr(sys, "argv", ["ssl_vit/pretrain.py", *settings, *arguments])
        with pytest.raises(SystemExit) as ended:
            errors.run(pretrain.main)
        return ended.value.code, *capsys.readouterr()

    yield main
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, said = result
    assert code == 2 and "Traceback" not in said, said
    sentence = said.splitlines()[-1]  # after the progress bars of `datasets`
    assert sentence.startswith("error: ") and said.count("error: ") == 1 and said.endswith("\n"), said
    for word in words:
        assert word in sentence, said


SETTINGS = {
    "unknown key": (["train.stepz=3"], ["'train.stepz'", "the command line", "'train.steps'"]),
    "wrong type": (["train.steps=abc"], ["train.steps", "whole number", "'abc'"]),
    "negative": (["train.batch_size=-4"], ["train.batch_size", "at least 1"]),
    "not a number": (["optim.lr=nan"], ["optim.lr", "finite"]),
    "impossible value": (["views.scale=[2, 3]"], ["views.scale"]),
    "no setting": (["steps"], ["'steps'", "key=value"]),
    "width against heads": (["backbone.num_heads=3"], ["backbone.embed_dim=16", "backbone.num_heads=3 heads"]),
    "image against patch": (["backbone.patch_size=3"], ["8x8", "patches of 3", "data.img_size"]),
    "mean of another length": (["data.mean=[0.1, 0.2]"], ["data.mean"]),
    "unknown data": (["--data", "cifar11"], ["'cifar11'", "Did you mean 'cifar10'?"]),
    "no data": (["--data", ""], ["Unknown data"]),
    "missing path": (["--data", "./photos"], ["'./photos'", "--data"]),
    "missing absolute path": (["--data", "/no/such/photos"], ["'/no/such/photos'", "--data"]),
    "unreachable hub": (["--data", "nobody/nothing"], ["nobody/nothing", "--data PATH"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(run, name):
    arguments, words = SETTINGS[name]
    refused(run(*arguments), *words)
    assert not os.path.exists("runs"), "nothing is left behind"


def test_recipes(run):
    refused(run(recipe="maee"), "'maee'", "Did you mean 'mae'?")
    Path("own.yaml").write_text("train: [")
    refused(run(recipe="own.yaml"), "own.yaml", "YAML")
    Path("own.yaml").write_text("train: {epocs: 3}\nobjective: {name: reconstruct}\n")
    refused(run(recipe="own.yaml"), "'train.epocs'", "own.yaml", "'train.epochs'")
    save("image.png")
    refused(run(recipe="image.png"), "image.png")


def test_batch_that_does_not_divide_by_processes(run, monkeypatch):
    monkeypatch.setattr(engine.Accelerator, "num_processes", property(lambda self: 3))
    refused(run(), "train.batch_size=8", "3 processes", "multiple of 3")


def test_a_tracker_that_is_not_installed(run, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    refused(run("monitor.trackers=wandb"), "monitor.trackers", "wandb", "not installed")


def test_a_checkpoint_that_only_the_first_process_sees(run, monkeypatch):
    monkeypatch.setattr(pretrain, "broadcast_object_list", lambda said: said if isinstance(said[0], tuple) else [7])
    refused(run(), "the checkpoint of step 7", "this one that of step 0", "file system that all machines share")


def test_folders(run):
    os.makedirs("empty")
    refused(run("--data", "empty"), "No images found under empty")
    Path("notes.txt").write_text("x")
    refused(run("--data", "notes.txt"), "notes.txt", "neither a folder nor a parquet file")
    Path("bad.parquet").write_text("x")
    refused(run("--data", "bad.parquet"), "bad.parquet", "cannot be read")
    save("pair/{i}.png", count=3)
    refused(run("--data", "pair", "data.train_split=trian"), "'trian'", "train", "data.train_split")
    os.makedirs("odd/one"), os.makedirs("odd/two")
    refused(run("--data", "odd"), "No images found")


def test_labels(run):
    save("flat/train/{i}.png", count=4)
    refused(run("--data", "flat", recipe="supervised"), "needs labels", "flat")
    save("one/train/cat/{i}.png", count=4)
    refused(run("--data", "one", recipe="supervised"), "supervised")
    images = [dict(bytes=Path(f"flat/train/{i % 4}.png").read_bytes(), path=None) for i in range(20)]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    one = datasets.Dataset.from_dict(dict(image=images, label=[3] * 20), features=features)
    one.to_parquet("one.parquet")
    refused(run("--data", "one.parquet", recipe="supervised"), "two classes")
    save("more/train/cat/{i}.png", count=2)
    save("more/train/dog/{i}.png", seed=9, count=2)
    save("more/test/bird/{i}.png", seed=20, count=2)
    more = recipes.Data(name="more")
    with pytest.raises(errors.UserError, match="more/test has classes that the training split lacks: bird"):
        data.load(more, "report", data.load(more, "train").classes)


def test_columns(run):
    datasets.Dataset.from_dict(dict(picture=["a"] * 20, kind=[0, 1] * 10)).to_parquet("set.parquet")
    refused(run("--data", "set.parquet"), "no image column", "picture, kind", "data.image_column")
    refused(run("--data", "set.parquet", "data.image_column=img"), "'img'", "picture, kind")
    refused(
        run("--data", "set.parquet", "data.image_column=picture", "data.label_column=class"),
        "'class'",
        "data.label_column",
    )
    refused(
        run("--data", "set.parquet", "data.image_column=picture"),
        "'picture' names the image file 'a'",
        "data.image_column",
    )
    ragged = [[[0.5] * 8] * 7 + [[0.5] * 3]] * 20
    datasets.Dataset.from_dict(dict(image=ragged)).to_parquet("ragged.parquet")
    refused(run("--data", "ragged.parquet"), "neither an image nor an array")
    datasets.Dataset.from_dict(dict(image=[[[1] * 8] * 8] * 19 + [None])).to_parquet("holes.parquet")
    refused(run("--data", "holes.parquet"), "neither an image nor an array")


@pytest.mark.parametrize("setting", ["data.cache_gb=4", "data.cache_gb=0"])
def test_a_broken_image(run, setting):
    save("set/train/{i}.png", count=6)
    Path("set/train/3.png").write_bytes(Path("set/train/3.png").read_bytes()[:90])
    settings = ["--data", "set", "data.img_size=8", setting]
    refused(run(*settings), "Image 3.png cannot be decoded", "data.skip_broken=true")
    code, said, _ = run(*settings, "data.skip_broken=true", "--output=out")
    assert code == 0 and "Left out 1 broken image(s)" in said and "(5 images at 8x8)" in said
    for i in range(6):
        Path(f"set/train/{i}.png").write_bytes(b"x")
    refused(run(*settings, "data.skip_broken=true", "--output=none"), "images tried in set/train can be decoded")


def test_sizes_that_differ(run):
    for i, side in enumerate((8, 12, 16)):
        save(f"mixed/train/{i}.png", side=side)
    refused(run("--data", "mixed"), "mixed", "data.img_size", "mae-photos")
    code, said, _ = run("--data", "mixed", "data.img_size=8")
    assert code == 0 and "3 images at 8x8" in said


def test_unwritable_cache(run, monkeypatch):
    save("set/train/{i}.png", count=3)
    monkeypatch.setenv("SSL_VIT_CACHE", str(Path("set/train/0.png").resolve() / "cache"))
    refused(run("--data", "set"), "SSL_VIT_CACHE, or set data.cache_gb=0.")
    assert run("--data", "set", "data.cache_gb=0", "data.img_size=8")[0] == 0
    broken = run("--data", "set", "data.cache_gb=0", "data.img_size=8", "data.skip_broken=true")
    refused(broken, "SSL_VIT_CACHE")
    assert "cache_gb" not in broken[2]  # which would not help
    monkeypatch.setenv("SSL_VIT_CACHE", "filled")
    assert run("--data", "set", "--output=out")[0] == 0
    monkeypatch.setattr(files.Lock, "__enter__", lambda lock: pytest.fail("locked"))  # another's folder
    assert run("--data", "set", "--output=out")[0] == 0  # which is finished, and only read


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP, errno.ESTALE])
def test_a_path_that_the_system_refuses_is_one_sentence(number, capsys):
    """Such as a folder that may not be entered, wherever it is met first; a disk that fails keeps its traceback."""
    for refusing in (errno.EIO, number):
        with pytest.raises(SystemExit if refusing == number else OSError) as ended:
            errors.run(functools.partial(fail, refusing))
    assert ended.value.code == 2
    said = f"error: closed/own cannot be used ({os.strerror(number)}): mend that, or name another path."
    assert capsys.readouterr().err.splitlines() == [said]


def fail(number: int) -> int:
    raise OSError(number, os.strerror(number), "closed/own")


def test_a_refusal_of_no_path_keeps_its_traceback():
    """As of a semaphore where shared memory is closed."""

    def refuse() -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(PermissionError):
        errors.run(refuse)


def test_a_name_that_is_too_long_is_one_sentence(run):
    refused(run(f"--output={'a' * 300}"), "a" * 300, "cannot be used (File name too long)")


def test_a_link_to_itself_among_the_images_is_no_image(run):
    save("set/train/{i}.png", count=4)
    os.symlink("loop", "set/train/loop")
    code, said, _ = run("--data", "set")
    assert code == 0 and "4 images" in said


def test_a_home_folder_within_a_word_is_that_of_the_user(run, monkeypatch):
    """No shell replaces it there."""
    monkeypatch.setenv("HOME", os.getcwd())
    assert run("--output=~/first")[0] == 0 and Path("first/recipe.yaml").exists() and not Path("~").exists()
    assert run("backbone.init_from=~/first", "--output=~/second")[0] == 0


def test_an_engine_that_lacks_its_library_is_one_sentence(run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    refused(run(), "Accelerator() failed: Megatron")


@pytest.mark.parametrize("arguments", [["--data", "nobody/nothing"], ["--data", "set", "data.cache_gb=0"]])
def test_as_a_process(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    save("set/train/{i}.png", count=300)
    Path("set/train/10.png").write_bytes(b"x")  # the probe of 256 skips it
    command = [sys.executable, str(ROOT / "ssl_vit" / "pretrain.py"), "--recipe", "mae", *TINY, *arguments]
    result = subprocess.run(
        [*command, "runtime.num_workers=1", "train.steps=3", "train.batch_size=128"],
        env=environment() | dict(SSL_VIT_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_several_mistakes_at_once(run):
    Path("own.yaml").write_text("train: {epocs: 3}\nobjective: {name: reconstruct}\n")
    code, _, said = run("steps", "optim.lr=-1", recipe="own.yaml")
    assert code == 2 and said.splitlines() == [
        "error: 3 mistakes:",
        "- 'steps' is not a setting: write key=value, as in train.epochs=20.",
        "- Unknown key 'train.epocs' in own.yaml. Did you mean 'train.epochs'?",
        "- optim.lr in the command line must be above 0, not -1.0.",
    ]
    assert not os.path.exists("runs")
