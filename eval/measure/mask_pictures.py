"""Pictures of masks: images, the true classes of their pixels, and those that were found."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from eval.measure import dense, features, results
from ssl_vit import pictures
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.recipe import short
from ssl_vit.views import Evaluation

SHOWN = 6  # images in a picture


def save(
    source: features.Source,
    test: ImageSet,
    view: Evaluation,
    shown: np.ndarray,
    columns: Sequence[list[np.ndarray]],
    words: list[str],
    kind: str,
) -> None:
    """SOURCE/pictures/DATA-KIND.png: a row for each image, its mask and what was found beside it.

    columns: masks, uint8 (h, w), of the images shown, for each column but the first; words: what all columns show.
    """
    [images] = evaluation_views(test, view, torch.device("cpu"), torch.from_numpy(shown))
    panels = [images[:, :3] if test.channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)]
    for masks in columns:
        drawn = [torch.from_numpy(coloured(mask)).permute(2, 0, 1) for mask in masks]
        panels.append(torch.stack([interpolate(mask[None], view.size, mode="nearest")[0] for mask in drawn]))
    title = f"{test.name}, {test.split}: images {', '.join(map(str, shown.tolist()))}"
    sheet = pictures.Sheet(torch.stack(panels, 1), words)
    with results.lock(source.folder):
        pictures.save(sheet, source.folder / "pictures" / f"{short(test.name)}-{kind}.png", title)


def coloured(mask: np.ndarray) -> np.ndarray:
    """A mask (h, w) as RGB (h, w, 3) in [0, 1]: a colour of its own for each class, black where pixels do not count."""
    hue = (mask * 0.618034) % 1.0  # golden ratio: neighbouring numbers get hues far apart
    light = 0.45 + 0.2 * (mask % 3)
    wheel = np.clip(np.abs((hue[..., None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    shown = light[..., None] + (wheel - 0.5) * 0.7
    return np.where((mask == dense.IGNORED)[..., None], 0.0, np.clip(shown, 0, 1)).astype(np.float32)
