"""Views and steps together, from decoded images of 32 px in memory, at the size of the small recipes.

Ours makes the views of a batch at once; lightly's transforms take one PIL image at a time in a DataLoader's workers, as
in its examples.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from benchmark.contests import steps
from benchmark.turns import Apart, Contest, cost
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssl_vit import system

BATCHES = 8  # of one call
WIDTH, DEPTH = 96, 4


def contests(device: torch.device, batch_size: int, threads: int) -> Iterator[Contest]:
    if importlib.util.find_spec("lightly") is None:
        return
    for name, goal in dict(mae=1.3, dino=3).items():
        arguments = batch_size, device, threads
        with Apart(entrant, name, "ours", *arguments) as own, Apart(entrant, name, "lightly", *arguments) as other:
            peers = {"lightly": partial(other.ask, cost, device)}
            what = f"views and steps of {name}"
            yield Contest(what, partial(own.ask, cost, device), peers, BATCHES * batch_size, "image", goal)


def entrant(name: str, who: str, batch_size: int, device: torch.device, threads: int) -> Callable[[], object]:
    steps.DIM, steps.DEPTH = WIDTH, DEPTH  # in this process
    images = torch.randint(0, 256, (BATCHES * batch_size, 3, steps.SIZE, steps.SIZE), dtype=torch.uint8)
    if who == "ours":
        system.prepare(threads)
        _, step = steps.ours(name, batch_size, device)
        batches = images.to(device).split(batch_size)
        return lambda: [step(batch) for batch in batches]
    torch.set_num_threads(threads)
    from lightly.transforms import DINOTransform, MAETransform

    crops = dict(global_crop_size=steps.SIZE, local_crop_size=steps.SIZE // 2, n_local_views=steps.LOCAL)
    transform = MAETransform(input_size=steps.SIZE) if name == "mae" else DINOTransform(**crops)
    model = (steps.LightlyMae() if name == "mae" else steps.LightlyDino()).to(device)
    loader = DataLoader(
        Transformed(images, transform),
        batch_size,
        shuffle=True,
        num_workers=threads,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    step = steps.stepping(model, batch_size, device)
    return lambda: [step([view.to(device, non_blocking=True) for view in views]) for views in loader]


class Transformed(Dataset[list[Tensor]]):
    """images: uint8 (N, 3, H, W); transform: of a PIL image, to a list of views (3, h, w)."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images = [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])
