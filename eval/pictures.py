"""Pictures of what a backbone sees in a few test images, written beside those of pre-training."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from eval.features import Features, Source
from ssl_vit import neighbours, pictures, weights
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.recipe import short

SHOWN, NEAREST = 6, 6


@torch.inference_mode()
def write(source: Source, train: ImageSet, test: ImageSet, bank: Features, queries: Features) -> None:
    """SOURCE/pictures/DATA-neighbours.png and DATA-patches.png.

    neighbours: a row for each test image, first itself, then the training images nearest to it by the class token, or
    the mean of the patches where there is none (centred cosine). patches: the first three principal components of the
    patch features of these images, over all of them, as red, green and blue.
    """
    device = next(source.backbone.parameters()).device
    chosen = torch.from_numpy(np.linspace(0, len(test) - 1, SHOWN).astype(np.int64))
    images = _views(source, test, chosen, device)
    pooling = next(iter(bank.poolings(-1)))
    near, far = neighbours.prepare(bank.poolings(-1)[pooling], queries.poolings(-1)[pooling][chosen.numpy()])
    nearest = neighbours.nearest(near, far, min(NEAREST, len(near)))[1]
    found = _views(source, train, torch.from_numpy(nearest.flatten()), device).unflatten(0, nearest.shape)
    folder = source.folder / "pictures"
    pictures.save(torch.cat([images[:, None], found], 1), folder / f"{short(test.name)}-neighbours.png")

    [(_, patches)] = source.backbone.features(images.to(device))
    colours = components(patches.float().cpu())
    colours = interpolate(colours.permute(0, 3, 1, 2), images.shape[-2:], mode="nearest")
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if images.shape[1] == 3:
        pictures.save(torch.stack([images, colours]), folder / f"{short(test.name)}-patches.png")


def components(patches: Tensor) -> Tensor:
    """Patch features (B, H, W, D) → their first three principal components (B, H, W, 3), each stretched to [0, 1]
    between its 1st and 99th percentile."""
    flat = patches.flatten(0, 2)
    _, _, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    three = (flat - flat.mean(0)) @ directions[:3].T
    if three.shape[1] < 3:
        three = torch.cat([three, three.new_zeros(len(three), 3 - three.shape[1])], 1)
    low, high = three.quantile(0.01, 0), three.quantile(0.99, 0)
    return ((three - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).unflatten(0, patches.shape[:3])


def _views(source: Source, images: ImageSet, chosen: Tensor, device: torch.device) -> Tensor:
    size = source.size
    return torch.cat(list(evaluation_views(images, size, weights.crop_pct(size), device, chosen))).cpu()
