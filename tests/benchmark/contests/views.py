"""Augmented views and random numbers, against torchvision's transforms, one image at a time, and torch's generator."""

from collections.abc import Iterator

import torch
from benchmark.turns import Contest
from torchvision.transforms import v2

from ssl_vit import views
from ssl_vit.randomness import Draw

COUNT = 512  # images


def contests(device: torch.device) -> Iterator[Contest]:
    for stored, goal in ((32, 10), (64, 6)):
        images = torch.randint(0, 256, (COUNT, 3, stored, stored), dtype=torch.uint8)
        on_device, spec = images.to(device), views.crop_flip((32, 32), 0.5)
        yield Contest(
            f"crop and flip, {stored} → 32 px",
            lambda spec=spec, batch=on_device: views.augment(spec, batch, step=0),
            {"torchvision v2": lambda images=images: _each(_crop(32, (0.2, 1.0)), images, device)},
            COUNT,
            "image",
            goal,
        )
    images = torch.randint(0, 256, (COUNT, 3, 32, 32), dtype=torch.uint8)
    on_device, spec = images.to(device), views.dino((32, 32), (16, 16), 8, 0.5)
    first, second = [*_crop(32, (0.4, 1.0)), *_colours(1.0, 0.0)], [*_crop(32, (0.4, 1.0)), *_colours(0.1, 0.2)]
    local = [*_crop(16, (0.05, 0.4)), *_colours(0.5, 0.0)]
    yield Contest(
        "DINO's 2 + 8 views, 32 px",
        lambda: views.augment(spec, on_device, step=0),
        {"torchvision v2": lambda: [_each(ops, images, device) for ops in (first, second, *[local] * 8)]},
        COUNT,
        "image",
        25,
    )
    rows = torch.arange(256)
    yield Contest(
        "normal noise of 256 images of 32 px",
        lambda: Draw(0, 0, rows, device).normal("noise", 3, 32, 32),
        {"torch.randn": lambda: torch.randn(256, 3, 32, 32, device=device)},
        256,
        "image",
        0.25,
    )


def _crop(size: int, scale: tuple[float, float]) -> list[v2.Transform]:
    return [v2.RandomResizedCrop(size, scale, antialias=True), v2.RandomHorizontalFlip()]


def _colours(blur: float, solarize: float) -> list[v2.Transform]:
    """DINO's, of main_dino.py."""
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    smooth = v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], blur)
    return [jitter, v2.RandomGrayscale(0.2), smooth, *([v2.RandomSolarize(128, solarize)] if solarize else [])]


def _each(operations: list[v2.Transform], images: torch.Tensor, device: torch.device) -> torch.Tensor:
    transform = v2.Compose([*operations, v2.ToDtype(torch.float32, scale=True)])
    return torch.stack([transform(image) for image in images]).to(device)
