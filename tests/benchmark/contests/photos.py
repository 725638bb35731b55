"""Photos on the way into training and evaluation, one process, against plain decoding of the same files by Pillow; and
large ones with data.jpeg_draft, against the same without it."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmark.turns import Contest
from PIL import Image

from ssl_vit import data, views
from ssl_vit import recipe as recipes

SIZE = 224
MADE = 48  # JPEGs of 500x375 and 375x500, if no folder is named
LARGE = 16  # and of four times the sides, for data.jpeg_draft
SPECS = {
    "MAE, 224 px": views.resampled(views.crop_flip((SIZE, SIZE), 0.5), "bicubic"),
    "DINO, 2 + 8 views": views.resampled(views.dino((SIZE, SIZE), (96, 96), 8, 0.5), "bicubic"),
}


def contests(folder: Path | None) -> Iterator[Contest]:
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch)
            _make(folder)
        images = data.load(_config(folder), "train")
        files = sorted(file for file in (folder / "train").rglob("*") if file.is_file())
        chosen = np.arange(min(len(images), 256))
        assert images.images is None and len(files) == len(images), "photos in train/, of several sizes, are needed"

        def decode() -> None:
            for file in files[: len(chosen)]:
                np.asarray(Image.open(file).convert("RGB"))

        peer = {"Pillow, decoding alone": decode}
        goals = dict(zip(SPECS, (0.65, 0.3), strict=True))
        for name, spec in SPECS.items():
            yield Contest(
                f"photos for {name}", partial(_train, images, spec, chosen), peer, len(chosen), "image", goals[name]
            )
        yield Contest("photos for evaluation", partial(_evaluate, images, chosen), peer, len(chosen), "image", 0.6)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _make(folder, LARGE, (2000, 1500))
        whole, draft = (data.load(_config(folder, jpeg_draft=draft), "train") for draft in (False, True))
        chosen = np.arange(len(whole))
        calls: dict[str, Callable] = {name: partial(_train, spec=spec) for name, spec in SPECS.items()}
        for name, call in (calls | dict(evaluation=_evaluate)).items():
            entrants = [partial(call, images, chosen=chosen) for images in (draft, whole)]
            peer = {"decoded whole": entrants[1]}
            yield Contest(f"large photos for {name}, jpeg_draft", entrants[0], peer, len(chosen), "image")


def _config(folder: Path, **settings: bool) -> recipes.Data:
    return recipes.Data(name=str(folder), img_size=SIZE, in_chans=3, hold_out=False, **settings)


def _train(images: data.ImageSet, spec: views.ViewSpec, chosen: np.ndarray) -> None:
    for chunk in data.chunks(images, spec, iter([(0, chosen, chosen)]), 0, torch.device("cpu"), workers=0):
        assert chunk.crops is not None


def _evaluate(images: data.ImageSet, chosen: np.ndarray) -> None:
    list(data.evaluation_views(images, views.evaluation((SIZE, SIZE)), torch.device("cpu"), torch.from_numpy(chosen)))


def _make(folder: Path, count: int = MADE, size: tuple[int, int] = (500, 375)) -> None:
    """JPEGs of smooth structure with noise, so that they take about as many bytes as photos do. size: (W, H)."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        noisy = np.asarray(coarse).astype(int) + rng.integers(-12, 13, (*size[::-1], 3))
        split = "train" if i < count - 2 else "test"
        file = folder / split / f"class{i % 2}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(photo if i % 4 < 2 else photo.transpose(1, 0, 2)).save(file, quality=92)
