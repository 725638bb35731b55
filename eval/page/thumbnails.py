"""Small pictures of images, for a page."""

import numpy as np
import torch
from torch import Tensor

SIZE = 96  # pixels of a picture's sides


def pixels(views: Tensor) -> list[np.ndarray]:
    """Images (B, C, H, W) in [0, 1] → uint8 (H, W, 3); of channels other than three, the first as grey."""
    levels = (views.cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    levels = levels[:, :3] if levels.shape[1] >= 3 else levels[:, :1].expand(-1, 3, -1, -1)
    return [level.permute(1, 2, 0).numpy() for level in levels]
