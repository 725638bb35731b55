"""Frozen features of a backbone: a run, a timm model, or raw pixels as the control."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit import recipe as recipes
from ssl_vit import weights
from ssl_vit.backbone import Backbone
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.errors import UserError

CONTROLS = ("pixels", "pixels-pca64")


@dataclass
class Source:
    """What is evaluated. folder: where its rows go; settings: a run's recipe.yaml, or {}."""

    name: str
    folder: Path
    settings: dict
    backbone: Backbone | None  # None: raw pixels
    size: tuple[int, int] | None  # None: the images' own

    def data(self) -> recipes.Data | None:
        """The images of its pre-training, as its recipe names them."""
        return recipes.Data(**self.settings["data"]) if self.settings else None


def open_source(name: str, data: recipes.Data | None, size: tuple[int, int] | None) -> Source:
    """A run directory, a timm folder or model, or a control. data, size: those of the figures beside it."""
    if name in CONTROLS:
        return Source(name, Path("runs") / f"{name}-{_slug(data)}", {}, None, size)
    path = Path(name)
    backbone = weights.load(name).eval()
    if (path / "recipe.yaml").exists():
        return Source(name, path, yaml.safe_load((path / "recipe.yaml").read_text()), backbone, backbone.input_size)
    return Source(name, Path("runs") / f"{path.name}-{_slug(data)}", {}, backbone, backbone.input_size)


def _slug(data: recipes.Data | None) -> str:
    if data is None:
        raise UserError("Which images? Pass --data, or name a run first: its own images are taken then.")
    return Path(data.name).resolve().name if Path(data.name).exists() else data.name.replace("/", "-")


@dataclass
class Features:
    """Features by pooling, float32 (n, D) each, in the order of the images; FLOPs and seconds spent."""

    by_pooling: dict[str, np.ndarray]
    flops: float
    seconds: float


@torch.inference_mode()
def extract(source: Source, images: ImageSet, device: torch.device, batch: int = 256) -> Features:
    """Last-block features of all images, pooled as "cls" (if there is a class token) and "mean" of the patches.

    Raises UserError, naming the image, if a feature is not a finite number.
    """
    started = time.perf_counter()
    size = source.size or images.size
    if source.backbone is None and (size is None or max(size) > 64):
        size = (64, 64)  # a photo's pixels are no feature
    views = evaluation_views(images, size, weights.crop_pct(size), device, batch=batch)
    if source.backbone is None:
        raw = torch.cat([view.flatten(1).cpu() for view in views]).numpy()
        return Features({f"raw {size[0]}x{size[1]}": raw}, 0.0, time.perf_counter() - started)
    if images.channels != len(source.backbone.mean):
        raise UserError(
            f"{source.name} takes images of {len(source.backbone.mean)} channels, and those of {images.name} have "
            f"{images.channels}."
        )
    backbone = source.backbone.to(device)
    found: dict[str, list] = {}
    flops = 0.0
    for view in views:
        if not flops:
            flops = _flops(backbone, view[:1]) * len(images)
        [(prefix, patches)] = backbone.features(view)
        found.setdefault("mean", []).append(patches.flatten(1, 2).mean(1).float().cpu())
        if prefix.shape[1]:
            found.setdefault("cls", []).append(prefix[:, 0].float().cpu())
    features = {pooling: torch.cat(parts).numpy() for pooling, parts in sorted(found.items())}
    for values in features.values():
        bad = np.flatnonzero(~np.isfinite(values).all(1))
        if len(bad):
            raise UserError(
                f"{source.name} gives features that are not finite, first for image {bad[0]}: it is broken."
            )
    return Features(features, flops, time.perf_counter() - started)


def pca(train: np.ndarray, others: np.ndarray, dimensions: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Both projected on the first principal components of the former."""
    from sklearn.decomposition import PCA

    fitted = PCA(min(dimensions, *train.shape), svd_solver="covariance_eigh").fit(train)
    return fitted.transform(train), fitted.transform(others)


def _flops(backbone: Backbone, view: torch.Tensor) -> float:
    fused = [m for m in backbone.modules() if getattr(m, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        backbone.features(view)
    for module in fused:
        module.fused_attn = True
    return float(counter.get_total_flops())
