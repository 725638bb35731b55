"""Sheets of small images, as PNG files."""

from pathlib import Path

from torch import Tensor
from torchvision.utils import make_grid, save_image

LEAST = 96  # pixels that the side of an image has at least


def save(panels: Tensor, file: Path) -> None:
    """Write images (rows, columns, C, H, W) in [0, 1] as one sheet, enlarged if small; of 2 or 4 and more channels the
    first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = panels.flatten(0, 1)
    images = images if images.shape[1] in (1, 3) else images[:, :1]
    scale = max(1, LEAST // images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    save_image(make_grid(images, nrow=panels.shape[1], pad_value=1.0), file)
