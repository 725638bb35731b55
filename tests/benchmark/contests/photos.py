"""Photos on the way into training and evaluation, one process, against plain decoding of the same files by Pillow."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from benchmark.turns import Contest
from PIL import Image

from ssl_vit import data, views
from ssl_vit import recipe as recipes

SIZE = 224
MADE = 48  # JPEGs of 500x375 and 375x500, if no folder is named


def contests(folder: Path | None) -> Iterator[Contest]:
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch)
            _make(folder)
        config = recipes.Data(name=str(folder), img_size=SIZE, in_chans=3, hold_out=False)
        images = data.load(config, "train")
        files = sorted(file for file in (folder / "train").rglob("*") if file.is_file())
        chosen = np.arange(min(len(images), 256))
        assert images.images is None and len(files) == len(images), "photos in train/, of several sizes, are needed"

        def decode() -> None:
            for file in files[: len(chosen)]:
                np.asarray(Image.open(file).convert("RGB"))

        def train(spec: views.ViewSpec) -> None:
            for chunk in data.chunks(images, spec, iter([(0, chosen, chosen)]), 0, torch.device("cpu"), workers=0):
                assert chunk.crops is not None

        mae = views.resampled(views.crop_flip((SIZE, SIZE), 0.5), "bicubic")
        dino = views.resampled(views.dino((SIZE, SIZE), (96, 96), 8, 0.5), "bicubic")
        peer = {"Pillow, decoding alone": decode}
        yield Contest("photos for MAE, 224 px", lambda: train(mae), peer, len(chosen), "image", 0.65)
        yield Contest("photos for DINO, 2 + 8 views", lambda: train(dino), peer, len(chosen), "image", 0.3)
        view = views.evaluation((SIZE, SIZE))
        evaluate = lambda: list(data.evaluation_views(images, view, torch.device("cpu"), torch.from_numpy(chosen)))  # noqa: E731
        yield Contest("photos for evaluation", evaluate, peer, len(chosen), "image", 0.6)


def _make(folder: Path) -> None:
    """JPEGs of smooth structure with noise, so that they take about as many bytes as photos do."""
    rng = np.random.default_rng(0)
    for i in range(MADE):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.asarray(coarse).astype(int) + rng.integers(-12, 13, (375, 500, 3))
        split = "train" if i < MADE - 2 else "test"
        file = folder / split / f"class{i % 2}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo = noisy.clip(0, 255).astype(np.uint8)
        Image.fromarray(photo if i % 4 < 2 else photo.transpose(1, 0, 2)).save(file, quality=92)
