"""Frozen features of a backbone: a run, weights of any layout that is known, or raw pixels as the control.

They are computed once per backbone and images, on all processes, and stored in SOURCE/features/ as .npy files.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import timm
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from ssl_vit import backbones, files, imports, models, system, views, weights
from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone, TokenBackbone
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.devices import out_of_memory
from ssl_vit.errors import UserError, say
from ssl_vit.files import fingerprint
from ssl_vit.flops import count
from ssl_vit.settings import known

CONTROLS = ("pixels", "pixels-pca64")
Vectors = Callable[["Source", Tensor, list[int]], dict[tuple[int, str], Tensor]]
VERSION = 3  # to be raised when this file or ssl_vit/views.py gives different features of the same backbone and images


@dataclass
class Source:
    """What is evaluated. folder: where its rows are stored; settings: a run's recipe.yaml, or {}."""

    name: str
    folder: Path
    settings: dict
    backbone: Backbone | None  # None: raw pixels
    size: tuple[int, int] | None  # None: the images' own
    weights: str | None = None  # a digest of the backbone as it was found, before images are shown at another size
    precision: system.Precision = "fp32"  # in which the backbone computes

    @property
    def network(self) -> Backbone:
        """The backbone, where an evaluator has refused raw pixels."""
        return known(self.backbone)

    def features(self, images: Tensor, blocks: Sequence[int] = (-1,)) -> list[tuple[Tensor, Tensor]]:
        """As `Backbone.features`, in float32, computed in this precision."""
        with self._autocast(images):
            found = self.network.features(images, blocks)
        return [(prefix.float(), patches.float()) for prefix, patches in found]

    def logits(self, images: Tensor) -> Tensor:
        """As `Backbone.classify`, in float32, computed in this precision."""
        with self._autocast(images):
            return self.network.classify(images).float()

    def _autocast(self, images: Tensor) -> torch.autocast:
        return torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    def depth(self) -> int:
        """The number of blocks that have features."""
        return self.backbone.depth if self.backbone else 1

    @property
    def permuted(self) -> bool:
        """Whether it is a run on images with permuted pixels (data.permute_pixels), which it is then shown always."""
        return bool(self.settings.get("data", {}).get("permute_pixels"))


def data_of(settings: dict) -> recipes.Data:
    """The images of a pre-training, as its recipe.yaml names them: all of them even if it was trained on a subset, with
    their own size, channels, mean and std. hflip stays as in the recipe, because only the user knows the labels.
    Permuted pixels do not: each run is shown images as in its own training, every other backbone those that are stored.
    JPEGs are decoded in full (data.jpeg_draft), since all backbones are judged on the same pixels.
    """
    info = dict.fromkeys(("img_size", "in_chans", "mean", "std", "subset"))
    own = dict(hold_out=False, permute_pixels=False, jpeg_draft=False)
    return recipes.Data(**settings["data"] | info | own)


def named(text: str) -> recipes.Data:
    """The images that --data names: those of a run, if it is one."""
    run = Path(text)
    if (run / "recipe.yaml").exists():
        return data_of(recipes.read_settings(run / "recipe.yaml"))
    return recipes.Data(name=text)


# how stored values become pixels: a model's business, and not to be guessed again from other images
READING = ("range", "background", "layout", "pages")
TABLE = ("config", "image_column", "label_column", "train_split", "report_split")  # where a set's images are


def read_as(settings: dict, config: recipes.Data) -> recipes.Data:
    """These images, their values read as in a pre-training, wherever the config leaves that open. settings: the run's,
    or {}."""
    told, default = settings.get("data", {}), recipes.Data()
    keys = READING + (TABLE if told.get("name") == config.name else ())
    own = {key: told[key] for key in keys if told.get(key) is not None}
    return dataclasses.replace(config, **{k: v for k, v in own.items() if getattr(config, k) == getattr(default, k)})


def seen_by(source: "Source", config: recipes.Data) -> recipes.Data:
    """`read_as`, with permuted pixels for a run that was trained on such: it is shown images as in its own training."""
    config = read_as(source.settings, config)
    if not source.permuted:
        return config
    return dataclasses.replace(config, permute_pixels=True, img_size=list(known(source.size)))


def open_source(
    name: str, data: recipes.Data | None, size: tuple[int, int] | None, shown: tuple[int, int] | None = None
) -> Source:
    """A run directory, weights as `ssl_vit.weights.load` takes them, or a control. data, size: those of the backbones
    that it is compared with. shown: the size (H, W) at which images are shown, instead of the backbone's own; that of a
    ViT is rounded up to whole patches, and its positions are resampled."""
    path = Path(name)
    backbone = None if name in CONTROLS else weights.load(name).eval()
    digest = None if backbone is None else weights.digest(backbone)[:12]
    if backbone and shown:
        sides = backbone.patch_size if isinstance(backbone, TokenBackbone) else (1, 1)
        height, width = (-(-length // side) * side for length, side in zip(shown, sides, strict=True))
        backbone = weights.load(f"{name},img_size={height},{width}").eval()
    if backbone and (path / "recipe.yaml").exists():
        return Source(name, path, recipes.read_settings(path / "recipe.yaml"), backbone, backbone.input_size, digest)
    if data is None:
        raise UserError("No images are named: pass --data, or name a run first, whose images are then used.")
    size = backbone.input_size if backbone else size or shown
    return Source(name, folder_of(name, data.name), {}, backbone, size, digest)


def folder_of(name: str, data: str) -> Path:
    """The folder for the rows of a backbone that is not a run. Those of files and folders of the same name, and of the
    same weights with other options, are distinguished by a hash."""
    source = weights.parse(name)
    telling = weights.resolved(name) if source.path.exists() or source.options else ""
    own = f"-{hashlib.sha256(telling.encode()).hexdigest()[:6]}" if telling else ""
    called = source.path.name if source.path.exists() else source.where.replace("/", "--").replace(":", "-")
    return Path("runs") / f"{called}{own}-{recipes.short(data)}"


@dataclass
class Features:
    """The features of all images of a split, in order: float32 (n, D), memory-mapped, by (block, pooling).

    Blocks count from 0. Poolings are "cls" (if there is a class token) and "mean" (of the patches) of what
    `Backbone.features` returns: for the last block, the model's own features. Raw pixels have "raw HxW".
    """

    arrays: dict[tuple[int, str], np.ndarray]
    flops_per_image: float
    project: Callable[[np.ndarray], np.ndarray] = lambda values: values  # what was applied to all of them after pooling

    def poolings(self, block: int) -> dict[str, np.ndarray]:
        """{pooling: (n, D)} of one block; -1 is the last."""
        block = block % (1 + max(b for b, _ in self.arrays))
        return {pooling: values for (b, pooling), values in self.arrays.items() if b == block}


def extract(
    source: Source,
    images: ImageSet,
    state: PartialState,
    blocks: Sequence[int] = (-1,),
    vectors: Vectors | None = None,
    view: views.Evaluation | None = None,
) -> Features:
    """The features after these blocks. Every process computes some of the rows and returns all.

    vectors: how an image becomes vectors, by default `pool`; view: what the backbone is shown, by default `view_of`.
    Raises UserError, naming the image, if a feature is not a finite number.
    """
    vectors, view = vectors or pool, view or view_of(source, images)
    if source.backbone is not None:
        source.backbone.to(state.device)
    blocks = sorted({block % source.depth for block in blocks})
    zero = torch.zeros(1, images.channels, *view.size, device=state.device)
    shapes = {key: value.shape[1] for key, value in vectors(source, zero, blocks).items()}
    flops = count(source.backbone, lambda twin: twin.features(zero.cpu())) if source.backbone else 0.0

    folder = source.folder / "features"
    key = _key(source, images, view)
    arrays = {k: folder / f"{key}-block{k[0]}-{k[1].replace(' ', '-')}.npy" for k in shapes}
    lock = files.Lock(folder / ".lock", remedy="Features are stored with the run: free space there.")
    with lock if state.is_main_process else nullcontext():  # against other evaluators of the same backbone
        state.wait_for_everyone()
        # The first process alone looks: a network file system would go on showing to another one what it saw there.
        [found] = broadcast_object_list([[k for k, f in arrays.items() if f.exists()] if state.is_main_process else []])
        if missing := {k: file for k, file in arrays.items() if k not in found}:
            _compute(source, images, state, view, vectors, missing, shapes)
    return Features({k: np.load(file, mmap_mode="r") for k, file in arrays.items()}, flops)


def view_of(source: Source, images: ImageSet) -> views.Evaluation:
    """The view that features are computed from: the backbone's own, or for raw pixels that of our runs."""
    if source.backbone is not None:
        return source.backbone.evaluation_view
    size = source.size or images.size
    if size is None or max(size) > 64:
        size = (64, 64)  # the pixels of a photo are too many for a feature
    return views.evaluation(size)


def extract_both(
    source: Source, train: ImageSet, test: ImageSet, state: PartialState, blocks: Sequence[int] = (-1,)
) -> tuple[Features, Features]:
    """Features of the training images and of the test images. pixels-pca64 projects both onto the principal components
    of the training images."""
    bank, others = (extract(source, images, state, blocks) for images in (train, test))
    if source.name == "pixels-pca64":
        for key, values in bank.arrays.items():
            bank.project = others.project = pca(values)
            bank.arrays[key], others.arrays[key] = bank.project(values), bank.project(others.arrays[key])
    return bank, others


@torch.inference_mode()
def _compute(
    source: Source,
    images: ImageSet,
    state: PartialState,
    view: views.Evaluation,
    vectors: Vectors,
    wanted: dict[tuple[int, str], Path],
    shapes: dict[tuple[int, str], int],
) -> None:
    """Compute these files of features; each process writes its own rows."""
    partial = {k: file.with_suffix(".partial.npy") for k, file in wanted.items()}
    if state.is_main_process:
        gigabytes = 4e-9 * len(images) * sum(shapes[k] for k in wanted)
        if gigabytes > 1:
            say(f"Features of {source.name} on {images.name}/{images.split}: {gigabytes:.1f} GB go to {source.folder}.")
        for k, file in partial.items():
            _allocate(file, (len(images), shapes[k]))
    state.wait_for_everyone()
    blocks = sorted({block for block, _ in wanted})
    mine = np.array_split(np.arange(len(images)), state.num_processes)[state.process_index]
    batches = evaluation_views(images, view, state.device, torch.from_numpy(mine))
    with ExitStack() as stack:
        bar = stack.enter_context(
            _progress(f"features of {source.name} on {images.name}/{images.split}", len(mine), state)
        )
        # not by memory maps: over NFS a machine would write whole pages, with what it has of another's rows in them
        streams = {k: stack.enter_context(_at_row(file, mine[0] if len(mine) else 0)) for k, file in partial.items()}
        arrays_of = pooled(source, blocks, vectors)
        for found in (part for batch in batches for part in arrays_of(batch)):
            for k, stream in streams.items():
                stream.write(np.ascontiguousarray(found[k]).data)
            bar.update(len(next(iter(found.values()))))
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    state.wait_for_everyone()
    arrays = {k: np.load(file, mmap_mode="r") for k, file in partial.items()}
    bad = min((i for array in arrays.values() for i in _not_finite(array)), default=None)  # the same on all processes
    if bad is not None:
        for file in partial.values() if state.is_main_process else ():
            file.unlink()
        raise UserError(f"{source.name} has features that are not finite, first for image {bad}: the model is broken.")
    state.wait_for_everyone()
    if state.is_main_process:
        for k, file in partial.items():
            os.replace(file, wanted[k])
    state.wait_for_everyone()


class Piecewise:
    """compute() on batches, with as many images at a time as fit into memory: halved whenever memory runs out."""

    def __init__(self, compute: Callable):
        self.compute = compute
        self.most: int | None = None  # images at a time; None: the whole batch

    def __call__(self, view: Tensor) -> Iterator:
        """The results of compute for consecutive parts of a batch (B, C, H, W). Raises UserError if no image fits."""
        at = 0
        while at < len(view):
            part, found = view[at:][: self.most], None
            try:
                found = self.compute(part)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise UserError(
                        "Not even one image at a time fits into GPU memory: free some, or compute on the CPU "
                        "(CUDA_VISIBLE_DEVICES=-1)."
                    ) from None
            if found is None:  # outside of `except`, which would keep the tensors alive
                self.most = len(part) // 2
                torch.cuda.empty_cache()
                continue
            yield found
            at += len(part)


@torch.no_grad()
def pool(source: Source, view: Tensor, blocks: list[int]) -> dict[tuple[int, str], Tensor]:
    """Features (B, D) by (block, pooling) of images (B, C, H, W) in [0, 1]."""
    if source.backbone is None:
        return {(0, f"raw {view.shape[-2]}x{view.shape[-1]}"): view.flatten(1)}
    found = {}
    for block, (prefix, patches) in zip(blocks, source.features(view, blocks), strict=True):
        if prefix.shape[1] and source.backbone.has_class_token:  # register tokens are not features
            found[block, "cls"] = prefix[:, 0]
        found[block, "mean"] = patches.flatten(1, 2).mean(1)
    return found


def pooled(source: Source, blocks: list[int], vectors: Vectors | None = None) -> Piecewise:
    """pool(), or other vectors, on parts of batches, as float32 arrays."""
    of = vectors or pool
    return Piecewise(lambda part: {k: v.float().cpu().numpy() for k, v in of(source, part, blocks).items()})


def pca(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The projection of features (m, D) onto the first 64 principal components of `train` (n, D)."""
    from sklearn.decomposition import PCA

    fitted = PCA(min(64, *train.shape), svd_solver="covariance_eigh").fit(train)
    return lambda values: fitted.transform(values).astype(np.float32)


def _key(source: Source, images: ImageSet, view: views.Evaluation) -> str:
    """What the features depend on, in 16 hex digits: weights, mean, std, images, their view, and the code."""
    about = [images.fingerprint, images.split, list(view.size), VERSION, str(torch.__version__), timm.__version__]
    about += ["pixels"] if source.backbone is None else [weights.digest(source.backbone), _code()]
    if source.backbone is not None and source.precision != "fp32":
        about.append(source.precision)
    if view != views.evaluation(view.size) or view.size[0] != view.size[1]:  # older code had no other view than ours
        about.append(asdict(view))  # and rounded views that are not square differently
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    """A hash of the code that computes features, but for timm's: our backbones and models, and modules of --import."""
    own = [file for part in (backbones, models) for file in sorted(Path(known(part.__file__)).parent.glob("*.py"))]
    return fingerprint([file.read_text(encoding="utf-8") for file in [*own, *imports.sources()]])


def _allocate(file: Path, shape: tuple[int, int]) -> None:
    """Create an empty float32 .npy file of this shape and reserve its disk space, so that a full disk is found before
    the work. Raises UserError if there is no space.
    """
    try:
        open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with open(file, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise files.cannot_write(file, error, "Features are stored with the run: free space there.") from None


def _at_row(file: Path, row: int) -> BinaryIO:
    """An .npy file, open to be written from this row on."""
    array = open_memmap(file, mode="r")
    stream = open(file, "r+b")
    stream.seek(array.offset + row * array.strides[0])
    return stream


def _not_finite(array: np.ndarray) -> Iterator[int]:
    """The index of the first row with a value that is not finite, if any."""
    for start in range(0, len(array), 4096):
        bad = np.flatnonzero(~np.isfinite(array[start : start + 4096]).all(1))
        if len(bad):
            yield start + int(bad[0])
            return


def _progress(text: str, total: int, state: PartialState) -> tqdm:
    return tqdm(desc=text, total=total, unit="image", leave=False, disable=not state.is_main_process, mininterval=1.0)
