"""Pictures of a backbone's features of a few test images, saved beside those of pre-training."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from eval.measure import results
from eval.measure.features import Features, Source
from ssl_vit import neighbours, pictures
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.recipe import short

SHOWN, NEAREST = 6, 6


@torch.inference_mode()
def write(source: Source, train: ImageSet, test: ImageSet, bank: Features, queries: Features) -> None:
    """SOURCE/pictures/DATA-neighbours.png and DATA-patches.png, with a row for each of the same few test images.

    neighbours: the image, then its nearest training images by the class token, or by the mean of the patches if there
    is none (centred cosine). patches: the image, then the first three principal components of the patch features of all
    these images as red, green and blue.
    """
    device = next(source.network.parameters()).device
    chosen = pictures.spread(len(test), test.labels, SHOWN)
    images = _views(source, test, chosen, device)
    pooling = next(iter(bank.poolings(-1)))
    near, far = neighbours.prepare(bank.poolings(-1)[pooling], queries.poolings(-1)[pooling][chosen.numpy()])
    nearest = neighbours.nearest(near, far, min(NEAREST, len(near)))[1]
    found = _views(source, train, torch.from_numpy(nearest.flatten()), device).unflatten(0, nearest.shape)
    folder, name = source.folder / "pictures", short(test.name)
    title = f"{test.name}, {test.split}: images {', '.join(map(str, chosen.tolist()))}"
    space = "class token" if pooling == "cls" else "mean of the patches"
    ranks = [f"neighbour {rank} in train" for rank in range(1, nearest.shape[1] + 1)]
    ranks[0] += f", by the {space}"
    neighbouring = pictures.Sheet(torch.cat([images[:, None], found], 1), ["original", *ranks])

    [(_, patches)] = source.features(images.to(device))
    colours = components(patches.cpu())
    colours = interpolate(colours.permute(0, 3, 1, 2), images.shape[-2:], mode="nearest")
    shown = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    words = ["original", "patch features: three principal components as red, green, blue"]
    parts = pictures.Sheet(torch.stack([shown, colours], 1), words)
    with results.lock(source.folder):
        pictures.save(neighbouring, folder / f"{name}-neighbours.png", title)
        pictures.save(parts, folder / f"{name}-patches.png", title)


def components(patches: Tensor) -> Tensor:
    """Patch features (B, H, W, D) → their first three principal components (B, H, W, 3), each stretched to [0, 1]
    between its 1st and 99th percentile."""
    flat = patches.flatten(0, 2)
    _, _, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    three = (flat - flat.mean(0)) @ directions[:3].T
    if three.shape[1] < 3:
        three = torch.cat([three, three.new_zeros(len(three), 3 - three.shape[1])], 1)
    low, high = three.quantile(0.01, 0), three.quantile(0.99, 0)
    stretched: Tensor = ((three - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return stretched.reshape(*patches.shape[:3], 3)


def _views(source: Source, images: ImageSet, chosen: Tensor, device: torch.device) -> Tensor:
    return torch.cat(list(evaluation_views(images, source.network.evaluation_view, device, chosen))).cpu()
