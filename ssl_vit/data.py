"""Where images come from: a name, a path or owner/name on the hub → uint8 images on the device.

Sets whose images share one size and fit `data.cache_gb` are decoded once into a uint8 tensor that is kept on disk,
lives on the device and is indexed there. Others are decoded, and cropped from the original, by worker processes.
"""

import fcntl
import functools
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from ssl_vit import recipe as recipes
from ssl_vit import views
from ssl_vit.errors import UserError, nearest, say
from ssl_vit.randomness import Draw

datasets.disable_progress_bars()

# Data facts of known names: hub id, image and label column, report split, whether a flip keeps the label.
HUB = {
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label", "test", True),
    "cifar10": ("uoft-cs/cifar10", "img", "label", "test", True),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", "test", True),
    "tiny-imagenet": ("zh-plus/tiny-imagenet", "image", "label", "valid", True),
    "imagenet-1k": ("ILSVRC/imagenet-1k", "image", "label", "validation", True),
}
NAMES = ("digits", *HUB)
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "images", "pixel_values"), ("label", "labels", "fine_label", "class")
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass
class ImageSet:
    """One split. images: uint8 (N, C, H, W) if decoded, else None and `photo(i)` decodes one, uint8 (C, h, w)."""

    name: str
    split: str
    labels: Tensor | None  # int64 (N,)
    classes: list[str] | None
    fingerprint: str
    channels: int
    images: Tensor | None = None
    photo: Callable[[int], Tensor] | None = None
    flip: bool = True
    broken: list[str] = field(default_factory=list)  # what `skip_broken` left out
    count: int = 0  # of photos

    def __len__(self) -> int:
        return self.count if self.images is None else len(self.images)

    def to(self, device: torch.device) -> "ImageSet":
        """The same set with its decoded images and labels on the device."""
        if self.images is not None:
            self.images = self.images.to(device)
        if self.labels is not None:
            self.labels = self.labels.to(device)
        return self

    def facts(self) -> dict:
        """What the data are, for the recipe: size, channels, mean and std in [0, 1], classes, flip."""
        if self.images is not None:
            size = list(self.images.shape[-2:])
            counts = _histograms(self.images)
            level = torch.arange(256, dtype=torch.float64) / 255
            mean = (counts * level).sum(1) / counts.sum(1)
            std = ((counts * (level - mean[:, None]) ** 2).sum(1) / counts.sum(1)).sqrt()
            mean, std = [round(v, 4) for v in mean.tolist()], [max(round(v, 4), 1e-3) for v in std.tolist()]
        else:
            size = None
            # ImageNet's, as every codebase of the field has them
            mean = [0.485, 0.456, 0.406] if self.channels == 3 else [0.5] * self.channels
            std = [0.229, 0.224, 0.225] if self.channels == 3 else [0.25] * self.channels
        size = size[0] if size and size[0] == size[1] else size
        return dict(size=size, channels=self.channels, mean=mean, std=std, flip=self.flip)


def load(config: recipes.Data, role: str, classes: list[str] | None = None) -> ImageSet:
    """The images that `config` names. role: "train" or "report"; classes: the training set's, so that labels agree.

    Raises UserError for an unknown name, a missing path, an unreachable hub, an empty folder, a broken image.
    """
    if config.name == "digits":
        return _digits(role)
    rows, split, image, label, flip = _rows(config, role)
    labels, classes = _labels(rows, label, classes)
    name = Path(config.name).resolve().name if Path(config.name).exists() else config.name
    common = dict(name=name, split=split, classes=classes, flip=flip)
    read = functools.partial(_read, rows, image)
    probe = [read(int(i)) for i in np.linspace(0, len(rows) - 1, min(len(rows), 256))]
    channels = config.channels or max((_channels(p) for p in probe if not isinstance(p, Exception)), default=3)
    shapes = {_size(p) for p in probe if not isinstance(p, Exception)}
    decode = functools.partial(_decode, read, channels)
    identity = hashlib.sha256(f"{_files(rows, image, config)} {split} {image} {label} {channels}".encode()).hexdigest()
    if len(shapes) == 1 and len(rows) * channels * math.prod(next(iter(shapes))) <= config.cache_gb * 1e9:
        decoded = _cached(identity, decode, len(rows), labels, config.skip_broken, f"{name} ({split})")
        if decoded is not None:
            images, labels, broken, fingerprint = decoded
            return ImageSet(
                labels=labels, images=images, channels=channels, fingerprint=fingerprint, broken=broken, **common
            )
    photo = functools.partial(_photo, decode, config.skip_broken, len(rows))
    return ImageSet(
        labels=labels, photo=photo, count=len(rows), channels=channels, fingerprint=identity[:16], **common
    )


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Rows of one step on one process. crops: what workers made of photos, uint8 (B, V, C, h, w) by view."""

    draw: Draw
    indices: Tensor
    crops: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, start: int, stop: int) -> "Chunk":
        """The chunk's rows start:stop."""
        d = self.draw
        crops = self.crops and {name: crop[start:stop] for name, crop in self.crops.items()}
        return Chunk(Draw(d.seed, d.step, d.rows[start:stop], d.device, d.prefix), self.indices[start:stop], crops)

    def views(self, images: ImageSet, spec: views.ViewSpec) -> dict[str, Tensor]:
        """The augmented views, float32 in [0, 1], on the device."""
        device = self.draw.device
        if self.crops is None:
            return views.make(spec, images.images[self.indices.to(device, non_blocking=True)], self.draw)
        crops = {name: crop.to(device, non_blocking=True) for name, crop in self.crops.items()}
        return views.finish(spec, crops, self.draw)


def chunks(
    images: ImageSet,
    spec: views.ViewSpec,
    plan: Iterator[tuple[int, np.ndarray, np.ndarray]],
    seed: int,
    device: torch.device,
    workers: int,
) -> Iterator[Chunk]:
    """A chunk for every (step, rows, indices) of the plan; photos are decoded and cropped ahead by workers."""
    if images.images is not None:
        for step, rows, indices in plan:
            yield Chunk(Draw(seed, step, torch.from_numpy(rows), device), torch.from_numpy(indices))
        return
    dataset = _Crops(images.photo, spec, seed)
    batches = ([(step, int(r), int(i)) for r, i in zip(rows, indices)] for step, rows, indices in plan)
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda", collate_fn=_collate
    )
    for step, rows, indices, crops in map(_unwrap, loader):
        yield Chunk(Draw(seed, step, rows, device), indices, crops)


def evaluation_views(
    images: ImageSet,
    size: tuple[int, int],
    crop_pct: float,
    device: torch.device,
    indices: Tensor | None = None,
    batch: int = 256,
    workers: int = 0,
) -> Iterator[Tensor]:
    """Batches of unaugmented views, float32 (B, C, H, W) in [0, 1], of these images (default: all, in order)."""
    indices = torch.arange(len(images)) if indices is None else indices.cpu()
    if images.images is not None:
        for part in indices.split(batch):
            yield views.whole(images.images[part.to(images.images.device)].to(device), size, crop_pct)
        return
    dataset = _Whole(images.photo, size, crop_pct)
    loader = DataLoader(
        dataset, batch_size=batch, sampler=indices.tolist(), num_workers=workers, collate_fn=_collate_whole
    )
    for part in map(_unwrap, loader):
        yield part.to(device).float() / 255


class _Crops:
    """Decodes one photo and crops all its views from the original. An item is (step, row, index)."""

    def __init__(self, photo: Callable[[int], Tensor], spec: views.ViewSpec, seed: int):
        self.photo, self.spec, self.seed = photo, spec, seed

    def __getitem__(self, item: tuple[int, int, int]):
        step, row, index = item
        try:
            crops = views.crop_photo(self.spec, self.photo(index), Draw(self.seed, step, torch.tensor([row])))
        except UserError as error:
            return error
        return step, row, index, crops


class _Whole:
    def __init__(self, photo: Callable[[int], Tensor], size: tuple[int, int], crop_pct: float):
        self.photo, self.size, self.crop_pct = photo, size, crop_pct

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            photo = self.photo(index)
        except UserError as error:
            return error
        return (views.whole(photo[None], self.size, self.crop_pct)[0] * 255).round().byte()


def _collate_whole(items: list):
    return next((i for i in items if isinstance(i, UserError)), None) or torch.stack(items)


def _unwrap(batch):
    """A worker hands its error over as a value: raised there, it would arrive wrapped in a traceback."""
    if isinstance(batch, UserError):
        raise batch
    return batch


def _collate(items: list):
    for item in items:
        if isinstance(item, UserError):
            return item
    steps, rows, indices, crops = zip(*items)
    stacked = {name: torch.stack([c[name] for c in crops]) for name in crops[0]}
    return steps[0], torch.tensor(rows), torch.tensor(indices), stacked


# -- where rows come from ---------------------------------------------------------------------------------------------


def _digits(role: str) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, report = train_test_split(np.arange(1797), test_size=360, stratify=bunch.target, random_state=0)
    chosen = np.sort(train if role == "train" else report)
    images = torch.from_numpy((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target[chosen]).long()
    return ImageSet(
        name="digits",
        split="train" if role == "train" else "the fixed 360",
        labels=labels,
        classes=[str(d) for d in range(10)],
        fingerprint=_fingerprint(images, labels),
        channels=1,
        images=images,
        flip=False,
    )


def _rows(config: recipes.Data, role: str):
    """(rows, split, image column, label column or None, whether flips keep the label) of one split."""
    flip = True
    path = Path(config.name)
    if config.name in HUB:
        hub_id, image, label, report, flip = HUB[config.name]
        splits = _hub(hub_id)
        image, label, report = config.image or image, config.label or label, config.report_split or report
    elif path.exists():
        splits = _parquet(path) if _has_parquet(path) else _folder(path)
        image, label, report = config.image, config.label, config.report_split
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", config.name) and not config.name.startswith("."):
        splits = _hub(config.name)
        image, label, report = config.image, config.label, config.report_split
    elif "/" in config.name or os.sep in config.name:
        raise UserError(f"There is no folder or file {config.name!r}: check --data.")
    else:
        raise UserError(
            f"Unknown data {config.name!r}.{nearest(config.name, NAMES)} Give one of {', '.join(NAMES)}, "
            "a folder of images or parquet files, or owner/name on the Hugging Face hub."
        )
    split, rows = _choose_split(splits, config, role, report)
    columns = rows.column_names
    image = image or next((c for c in IMAGE_COLUMNS if c in columns), None)
    label = label or next((c for c in LABEL_COLUMNS if c in columns), None)
    for key, column in (("image", image), ("label", label)):
        if column not in columns and (key == "image" or column is not None):
            raise UserError(
                f"{config.name} has no {key} column {column!r}; its columns are {', '.join(columns)}: "
                f"choose one with data.{key}=…"
            )
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows, split, image, label, flip


def _choose_split(splits: dict[str, datasets.Dataset], config: recipes.Data, role: str, report: str | None):
    """The training split, or the one whose figures are reported; without the latter, a hashed tenth of the former."""

    def named(*kinds: str) -> str | None:
        return next((s for kind in kinds for s in SPLITS[kind] if s in splits), None)

    train = config.train_split or named("train") or (next(iter(splits)) if len(splits) == 1 else None)
    report = report or named("test", "val")
    for key, split in (("train_split", train), ("report_split", report)):
        if split not in splits and (key == "train_split" or split is not None):
            raise UserError(
                f"{config.name} has no split {split!r}; its splits are {', '.join(splits)}: choose with data.{key}=…"
            )
    if report is not None and report != train:
        return (train, splits[train]) if role == "train" else (report, splits[report])
    rows = splits[train]
    # by the file's name if it has one, so that new files move none
    keys = rows["key"][:] if "key" in rows.column_names else map(str, range(len(rows)))
    held_out = np.array([int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10 == 0 for key in keys])
    if role == "train":
        say(f"{config.name} has no test split: a hashed tenth ({held_out.sum()} images) is held out for reports.")
    chosen = np.flatnonzero(held_out if role == "report" else ~held_out)
    return f"{train} ({'hashed tenth' if role == 'report' else 'the other nine tenths'})", rows.select(chosen)


def _hub(hub_id: str) -> dict[str, datasets.Dataset]:
    try:
        return dict(datasets.load_dataset(hub_id))
    except Exception as error:  # the hub's client raises a dozen types of its own for what is one thing to the user
        detail = " ".join(str(error).split())[:200]
        raise UserError(
            f"Could not get {hub_id!r} from the Hugging Face hub ({type(error).__name__}: {detail}). Check the name, "
            "the network and `hf auth login`, or download the images elsewhere and pass --data PATH."
        ) from None


def _has_parquet(path: Path) -> bool:
    return path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet")))


def _parquet(path: Path) -> dict[str, datasets.Dataset]:
    try:
        if path.is_file():
            return dict(datasets.load_dataset("parquet", data_files={"train": str(path)}))
        return dict(datasets.load_dataset(str(path)))
    except Exception as error:
        raise UserError(f"The parquet files in {path} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _folder(root: Path) -> dict[str, datasets.Dataset]:
    """Splits of an image folder: SPLIT/CLASS/*.jpg, SPLIT/*.jpg, CLASS/*.jpg or just *.jpg, at any depth."""
    if not root.is_dir():
        raise UserError(f"{root} is neither a folder nor a parquet file: check --data.")
    inner = {d.name: d for d in sorted(root.iterdir()) if d.is_dir()}
    known = {name: d for name, d in inner.items() if any(name in names for names in SPLITS.values())}
    splits = {}
    for split, folder in (known or {"train": root}).items():
        files = sorted(
            os.path.join(at, f)
            for at, _, names in os.walk(folder, followlinks=True)
            for f in names
            if os.path.splitext(f)[1].lower() in IMAGE_FILES and not f.startswith(".")
        )
        keys = [os.path.relpath(f, folder) for f in files]
        tops = [key.split(os.sep)[0] if os.sep in key else None for key in keys]
        columns = dict(image=files, key=keys)
        # labels are folders: there must be two or more, and every image in one
        if None not in tops and len(set(tops)) > 1:
            columns["label"] = tops
        if files:
            splits[split] = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    if not splits:
        raise UserError(f"No images found under {root}: looked for {', '.join(sorted(IMAGE_FILES))} and *.parquet.")
    return splits


def _labels(rows: datasets.Dataset, column: str | None, classes: list[str] | None):
    """(int64 labels, class names), or (None, None). Class numbers follow `classes` if given."""
    if column is None:
        return None, None
    feature, values = rows.features[column], rows[column][:]
    if isinstance(feature, datasets.ClassLabel):
        if min(values) < 0:  # how hub sets mark a split without labels
            return None, None
        values, own = [feature.names[v] for v in values], list(feature.names)
    else:
        own = sorted(set(values))
        values, own = [str(v) for v in values], [str(v) for v in own]
    classes = classes or own
    number = {name: i for i, name in enumerate(classes)}
    strangers = sorted(set(values) - number.keys())
    if strangers:
        raise UserError(f"Classes that the training split lacks: {', '.join(strangers[:5])}. Remove them or add them.")
    return torch.tensor([number[v] for v in values]), classes


def _files(rows: datasets.Dataset, image: str, config: recipes.Data) -> str:
    """What identifies the images without decoding them."""
    if "key" in rows.column_names:
        stats = [os.stat(cell["path"]) for cell in rows[image]]
        return json.dumps([(k, s.st_size, s.st_mtime_ns) for k, s in zip(rows["key"], stats)])
    return f"{rows._fingerprint} {config.skip_broken}"


# -- decoding ---------------------------------------------------------------------------------------------------------


def _read(rows: datasets.Dataset, column: str, i: int) -> Image.Image | np.ndarray | Exception:
    """The image of row i, its header read; an array (H, W[, C]) as it is; or the error, naming the image."""
    cell = rows[i][column]
    if not isinstance(cell, dict):
        return np.asarray(cell, dtype=np.uint8)
    where = rows[i]["key"] if "key" in rows.column_names else cell["path"] or f"row {i}"
    try:
        image = Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"])
        image.info["where"] = where
        return image
    except Exception as error:
        return UserError(f"Image {where} cannot be decoded ({error}).")


def _channels(image: Image.Image | np.ndarray) -> int:
    if isinstance(image, np.ndarray):
        return 1 if image.ndim == 2 else image.shape[-1]
    return 1 if image.mode in ("1", "L", "I;16", "I") else 3


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width)."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def _decode(read: Callable, channels: int, i: int) -> Tensor | UserError:
    """Image i as uint8 (C, H, W), or the error."""
    image = read(i)
    if isinstance(image, Exception):
        return image
    if not isinstance(image, np.ndarray):
        try:
            if image.mode in ("I;16", "I"):  # 16-bit grey: keep the upper byte, where PIL would clip
                image = np.asarray(image).astype(np.int64) >> 8
            else:
                mode = PIL_MODES.get(channels, "RGB")
                image = np.asarray(image if image.mode == mode else image.convert(mode))
        except Exception as error:
            return UserError(f"Image {image.info.get('where', i)} cannot be decoded ({error}).")
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if len(pixels) != channels:
        return UserError(f"Image {i} has {len(pixels)} channels, not {channels}: set data.channels.")
    return pixels.contiguous()


def _photo(decode: Callable, skip_broken: bool, n: int, i: int) -> Tensor:
    """Image i; with skip_broken, the next one that can be decoded."""
    for k in range(n):
        pixels = decode((i + k) % n)
        if not isinstance(pixels, Exception):
            return pixels
        if not skip_broken:
            raise UserError(f"{pixels} Mend or remove it, or pass data.skip_broken=true.")
        print(f"skipped: {pixels}")
    raise UserError("No image of the set can be decoded.")


def _cached(identity: str, decode: Callable, n: int, labels: Tensor | None, skip_broken: bool, title: str):
    """(images, labels, broken, fingerprint), decoded once per machine; None if the images differ in size."""
    folder = Path(os.environ.get("SSL_VIT_CACHE", Path.home() / ".cache" / "ssl_vit"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{identity[:24]}{'-skip' if skip_broken else ''}.safetensors"
    with open(file.with_suffix(".lock"), "w") as lock:  # the other processes wait here, before any group starts
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            say(f"Decoding {n:,} images of {title}, once …")
            with ThreadPoolExecutor() as pool:
                decoded = list(pool.map(decode, range(n)))
            broken = [str(d) for d in decoded if isinstance(d, Exception)]
            if broken and not skip_broken:
                raise UserError(f"{broken[0]} Mend or remove it, or pass data.skip_broken=true.")
            good = [i for i, d in enumerate(decoded) if not isinstance(d, Exception)]
            if len({decoded[i].shape for i in good}) != 1:
                return None
            tensors = dict(images=torch.stack([decoded[i] for i in good]))
            if labels is not None:
                tensors["labels"] = labels[good].clone()
            fingerprint = _fingerprint(tensors["images"], tensors.get("labels"))
            partial = file.with_suffix(f".{os.getpid()}")
            save_file(tensors, partial, metadata=dict(broken=json.dumps(broken), fingerprint=fingerprint))
            os.replace(partial, file)
    with safe_open(file, "pt") as stored:
        broken, fingerprint = json.loads(stored.metadata()["broken"]), stored.metadata()["fingerprint"]
        images = stored.get_tensor("images")
        labels = stored.get_tensor("labels") if labels is not None else None
    if broken:
        say(f"Left out {len(broken)} broken image(s) of {title}; the first: {broken[0]}")
    return images, labels, broken, fingerprint


def _fingerprint(images: Tensor, labels: Tensor | None) -> str:
    """What the pixels and labels are, in 16 hex digits."""
    digest = hashlib.sha256(np.ascontiguousarray(images.numpy()))
    if labels is not None:
        digest.update(labels.numpy())
    return digest.hexdigest()[:16]


def _histograms(images: Tensor) -> Tensor:
    """How often each value occurs per channel, float64 (C, 256): exact, and no float copy of the set."""
    channels = images.cpu().transpose(0, 1).flatten(1)
    return torch.stack([torch.bincount(c.int(), minlength=256) for c in channels]).double()
