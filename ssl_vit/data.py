"""Where images come from: a name, a path or owner/name on the hub → uint8 images on the device.

Sets whose images share one size and fit `data.cache_gb` are decoded once into a uint8 tensor that is kept on disk,
lives on the device and is indexed there. Others are decoded, and cropped from the original, by worker processes.
"""

import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import re
import socket
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import huggingface_hub.constants
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ssl_vit import recipe as recipes
from ssl_vit import subsets, views
from ssl_vit.errors import UserError, nearest, say
from ssl_vit.randomness import Draw

# Data facts of known names: hub id, image and label column, report split, whether a flip keeps the label.
HUB = {
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label", "test", True),
    "cifar10": ("uoft-cs/cifar10", "img", "label", "test", True),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", "test", True),
    "tiny-imagenet": ("zh-plus/tiny-imagenet", "image", "label", "valid", True),
    "imagenet-1k": ("ILSVRC/imagenet-1k", "image", "label", "validation", True),
}
KNOWN = HUB | {facts[0]: facts for facts in HUB.values()}  # by their hub ids too
NAMES = ("digits", *HUB)
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "images", "pixel_values"), ("label", "labels", "fine_label", "class")
FILE = "ssl_vit.file"  # the column with an image file's path under its split; no column of a user's has this name
# what `datasets` says before it lists the configurations of a set
CONFIGURATIONS = re.compile(r"(?:available configs|not found\. Available|[Cc]onfig(?:uration)?s in the cache): (.+)")
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PROBE = 256  # images whose headers are read to learn what a set is like

say_once = functools.cache(say)


@dataclass
class ImageSet:
    """One split. images: uint8 (N, C, H, W) if decoded, else None and `photo(i)` decodes one, uint8 (C, h, w)."""

    name: str
    split: str
    labels: Tensor | None  # int64 (N,)
    classes: list[str] | None
    fingerprint: str
    channels: int
    count: int
    size: tuple[int, int] | None  # (H, W), if the images share it
    images: Tensor | None = None
    photo: Callable[[int], Tensor] | None = None
    flip: bool = True

    def __len__(self) -> int:
        return self.count

    def to(self, device: torch.device) -> "ImageSet":
        """The same set with its decoded images and labels on the device."""
        if self.images is not None:
            self.images = self.images.to(device)
        if self.labels is not None:
            self.labels = self.labels.to(device)
        return self

    def part(self, chosen: Tensor) -> "ImageSet":
        """These images, int64 (M,) on the CPU (decoding processes see no other), alone."""
        return dataclasses.replace(
            self,
            labels=None if self.labels is None else self.labels[chosen],
            fingerprint=_fingerprint(self.fingerprint, chosen),
            count=len(chosen),
            images=None if self.images is None else self.images[chosen],
            photo=self.photo and functools.partial(_photo, self.photo, chosen),
        )

    def facts(self) -> dict:
        """What the data are, for the recipe: size, channels, mean and std in [0, 1], flip."""
        if self.images is not None:
            mean, std = _mean_std(self.images)
        elif self.channels == 3:  # ImageNet's, as every codebase of the field has them
            mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        else:
            mean, std = [0.5] * self.channels, [0.25] * self.channels
        size = self.size and (self.size[0] if self.size[0] == self.size[1] else list(self.size))
        return dict(size=size, channels=self.channels, mean=mean, std=std, flip=self.flip)


def load(config: recipes.Data, role: str, classes: list[str] | None = None) -> ImageSet:
    """The images that `config` names. classes: the training set's, so that labels agree.

    role: "train"; "held out", what `data.hold_out` leaves out of it; or "report", the split of the figures.
    Raises UserError for an unknown name, a missing path, an unreachable hub, an empty folder, a broken image.
    """
    whole = _load(config, "report" if role == "report" else "train", classes)
    if role == "report" or (config.subset is None and not config.hold_out):
        return whole
    labels = np.zeros(len(whole), dtype=int) if whole.labels is None else whole.labels.numpy()
    chosen = np.arange(len(whole))
    if config.subset is not None:
        chosen = subsets.stratified(labels, config.subset, config.subset_seed)
    if config.hold_out:
        fit, rest = subsets.hold_out(labels[chosen], config.subset_seed)
        chosen = chosen[rest if role == "held out" else fit]
    return whole.part(torch.from_numpy(chosen))


def _load(config: recipes.Data, role: str, classes: list[str] | None) -> ImageSet:
    if config.name == "digits":
        return _digits(role, config.channels or 1)
    rows, split, image, label, flip = _rows(config, role)
    path = Path(config.name)
    name = path.resolve().name if path.exists() else config.name
    if config.config:
        name = f"{name}-{config.config}"
    title = f"{name}/{split}"
    labels, classes = _labels(rows, label, classes, title)

    read = functools.partial(_read, rows, image)
    found, size = _probe(read, len(rows), config.skip_broken, title)
    channels = config.channels or found
    decode = functools.partial(_decode, read, channels)
    content = _identity(rows, image, split, channels)
    images, kept = None, None
    fits = size is not None and len(rows) * channels * math.prod(size) <= config.cache_gb * 1e9
    if fits or config.skip_broken:
        shape = (channels, *size) if fits else None
        stored = _cached(
            f"{content} {shape} {config.skip_broken}",
            functools.partial(_decode_all, decode, len(rows), shape, config.skip_broken),
            f"{'Decoding' if fits else 'Looking for broken images among'} {len(rows):,} images of {title}, once …",
        )
        images, kept, broken = stored["images"], stored["kept"], stored["broken"]
        content = stored["digest"] or f"{content} {broken}"
        if broken:
            say_once(f"Left out {len(broken)} broken image(s) of {title}; the first: {broken[0]}")
        if fits and images is None:
            say_once(f"The images of {title} differ in size: workers decode them when they are needed.")
            size = None
    if labels is not None and kept is not None:
        labels = labels[kept]
    return ImageSet(
        name=name,
        split=split,
        labels=labels,
        classes=classes,
        fingerprint=_fingerprint(content, labels),
        channels=channels,
        count=len(rows) if kept is None else len(kept),
        size=size,
        images=images,
        photo=functools.partial(_photo, functools.partial(_advising, decode), kept) if images is None else None,
        flip=flip,
    )


def cores() -> int:
    """CPU cores for each process of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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
        crops = self.crops and {name: crop[start:stop] for name, crop in self.crops.items()}
        return Chunk(self.draw.of(self.draw.rows[start:stop]), self.indices[start:stop], crops)

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
    batches = ([(step, int(r), int(i)) for r, i in zip(rows, indices, strict=True)] for step, rows, indices in plan)
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda", collate_fn=_collate
    )
    for steps, rows, indices, crops in _batches(loader):
        yield Chunk(Draw(seed, int(steps[0]), rows, device), indices, crops)


def evaluation_views(
    images: ImageSet,
    size: tuple[int, int],
    crop_pct: float,
    device: torch.device,
    indices: Tensor | None = None,
    batch: int = 256,
) -> Iterator[Tensor]:
    """Batches of unaugmented views, float32 (B, C, H, W) in [0, 1], of these images (default: all, in order)."""
    indices = torch.arange(len(images)) if indices is None else indices.cpu()
    if images.images is not None:
        for part in indices.split(batch):
            yield views.whole(images.images[part.to(images.images.device)].to(device), size, crop_pct)
        return
    dataset = _Whole(images.photo, size, crop_pct)
    workers = min(cores(), 16) if len(indices) > batch else 0
    loader = DataLoader(dataset, batch_size=batch, sampler=indices.tolist(), num_workers=workers, collate_fn=_collate)
    for part in _batches(loader):
        yield part.to(device).float() / 255


class _Crops:
    """Decodes one photo and crops all its views from the original. An item is (step, row, index)."""

    def __init__(self, photo: Callable[[int], Tensor], spec: views.ViewSpec, seed: int):
        self.photo, self.spec, self.seed = photo, spec, seed

    def __getitem__(self, item: tuple[int, int, int]) -> tuple[int, int, int, dict[str, Tensor]] | UserError:
        step, row, index = item
        try:
            return *item, views.crop_photo(self.spec, self.photo(index), Draw(self.seed, step, torch.tensor([row])))
        except UserError as error:
            return error


class _Whole:
    """Decodes one photo and makes its evaluation view, rounded to uint8 (C, H, W)."""

    def __init__(self, photo: Callable[[int], Tensor], size: tuple[int, int], crop_pct: float):
        self.photo, self.size, self.crop_pct = photo, size, crop_pct

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return (views.whole(self.photo(index)[None], self.size, self.crop_pct)[0] * 255).round().byte()
        except UserError as error:
            return error


def _collate(items: list):
    """The items stacked, or the first error among them: raised in a worker, it would arrive wrapped in a traceback."""
    return next((item for item in items if isinstance(item, UserError)), None) or default_collate(items)


def _batches(loader: DataLoader) -> Iterator:
    """The loader's batches. Raises the UserError of a worker, and one for a worker that the system killed."""
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            f"A decoding process died ({' '.join(str(error).split())[:200]}): if memory or /dev/shm is short, "
            "lower runtime.workers or runtime.per_device_batch."
        ) from None


# -- where rows come from ---------------------------------------------------------------------------------------------


def _digits(role: str, channels: int) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, report = train_test_split(np.arange(1797), test_size=360, stratify=bunch.target, random_state=0)
    chosen = np.sort(train if role == "train" else report)
    images = torch.from_numpy((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8))[:, None]
    images = images.repeat(1, channels, 1, 1)
    labels = torch.from_numpy(bunch.target[chosen]).long()
    return ImageSet(
        name="digits",
        split="train" if role == "train" else "the fixed 360",
        labels=labels,
        classes=[str(d) for d in range(10)],
        fingerprint=_fingerprint(_digest(images), labels),
        channels=channels,
        count=len(images),
        size=(8, 8),
        images=images,
        flip=False,
    )


def _rows(config: recipes.Data, role: str) -> tuple[datasets.Dataset, str, str, str | None, bool]:
    """(rows, split, image column, label column or None, whether flips keep the label) of one split."""
    unknown = (config.name, None, None, None, True)
    local = config.name and config.name not in HUB and Path(config.name).exists()
    hub_id, image, label, report, flip = unknown if local else KNOWN.get(config.name, unknown)
    image, label, report = config.image or image, config.label or label, config.report_split or report
    if local:
        splits = _local(Path(config.name), config)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_id):
        splits = _hub(hub_id, config.config)
    elif "/" in config.name:
        raise UserError(f"There is no folder or file {config.name!r}: check --data.")
    else:
        raise UserError(
            f"Unknown data {config.name!r}.{nearest(config.name, NAMES)} Give one of {', '.join(NAMES)}, "
            "a folder of images or parquet files, or owner/name on the Hugging Face hub."
        )
    split, rows = _choose_split(splits, config, role, report, label)
    columns = [c for c in rows.column_names if c != FILE]
    kinds = [c for c in columns if isinstance(rows.features[c], datasets.Image)]
    image = image or next((c for c in (*IMAGE_COLUMNS, *kinds) if c in columns), None)
    label = label or _label_column(rows)
    for key, column in (("image", image), ("label", label)):
        if column not in columns and (key == "image" or column is not None):
            raise UserError(
                f"{config.name} has no {key} column{'' if column is None else f' {column!r}'}; its columns are "
                f"{', '.join(columns)}: choose one with data.{key}=…"
            )
    if label is not None and not _is_class(rows.features[label]):
        raise UserError(f"Column {label!r} of {config.name} holds no class per image: choose with data.label=…")
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows, split, image, label, flip


def _is_class(feature) -> bool:
    dtype = getattr(feature, "dtype", "")
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and re.match(r"u?int|bool|(large_)?string", dtype) is not None
    )


def _label_column(rows: datasets.Dataset) -> str | None:
    """The column that holds the labels, where the user names none."""
    return next((c for c in LABEL_COLUMNS if c in rows.column_names and _is_class(rows.features[c])), None)


def _missing(feature, values: list) -> int:
    """How many labels are none: null, -1 among named classes (as in the hub's tests), or -1 throughout."""
    if all(value in (None, -1) for value in values):
        return len(values)
    named = isinstance(feature, datasets.ClassLabel)
    return sum(value is None or (named and value < 0) for value in values)


def _labelled(rows: datasets.Dataset, label: str | None) -> bool:
    """Whether any image has a label in this column, or in the one that would be taken."""
    column = label or _label_column(rows)
    return column in rows.column_names and _missing(rows.features[column], rows[column][:]) < len(rows)


def _choose_split(
    splits: dict[str, datasets.Dataset], config: recipes.Data, role: str, report: str | None, label: str | None
) -> tuple[str, datasets.Dataset]:
    """The training split, or the one whose figures are reported; without the latter, a hashed tenth of the former."""

    def named(*kinds: str) -> str | None:
        return next((s for kind in kinds for name in SPLITS[kind] for s in splits if s.lower() == name), None)

    train = config.train_split or named("train") or (next(iter(splits)) if len(splits) == 1 else None)
    if report is None:
        report, other = named("test", "val"), named("val")
        if role == "report" and other is not None and train not in (report, other):
            if not _labelled(splits[report], label) and _labelled(splits[other], label):
                say_once(f"The {report} split of {config.name} has no labels: figures are of {other}.")
                report = other
    for key, split in (("train_split", train), ("report_split", report)):
        if split not in splits and (key == "train_split" or split is not None):
            raise UserError(
                f"{config.name} has no {'training split' if split is None else f'split {split!r}'}; its splits are "
                f"{', '.join(splits)}: choose with data.{key}=…"
            )
    if report is not None and report != train:
        return (train, splits[train]) if role == "train" else (report, splits[report])
    rows = splits[train]
    # by the file's name if it has one, so that new files move none
    keys = rows[FILE][:] if FILE in rows.column_names else map(str, range(len(rows)))
    held_out = np.array([int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10 == 0 for key in keys])
    chosen = np.flatnonzero(held_out if role == "report" else ~held_out)
    if len(chosen) == 0:
        raise UserError(f"{config.name} has {len(rows)} image(s), too few to hold a tenth of them out for {role}.")
    if role == "train":
        say_once(f"{config.name} has no test split: a hashed tenth ({held_out.sum()} images) is held out for reports.")
    return f"{train} ({'hashed tenth' if role == 'report' else 'the other nine tenths'})", rows.select(chosen)


def _hub(hub_id: str, configuration: str | None) -> dict[str, datasets.Dataset]:
    if not _hub_answers():  # else its client would retry for 23 s; what it has downloaded before still loads
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return _load_dataset(hub_id, configuration)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises a dozen types of its own for what is one thing to the user
        raise UserError(
            f"There is no folder {hub_id!r} here, and the Hugging Face hub did not give it ({type(error).__name__}: "
            f"{_one_line(error)}). Check the name, the network and `hf auth login`, or download the images elsewhere "
            "and pass --data PATH."
        ) from None


def _load_dataset(source: str, configuration: str | None) -> dict[str, datasets.Dataset]:
    """Splits of a set on the hub or in a folder. Raises UserError if it has other configurations than asked for."""
    try:
        return dict(datasets.load_dataset(source, configuration))
    except ValueError as error:
        listed = CONFIGURATIONS.search(str(error))
        if listed is None:
            raise
        names = ", ".join(name.strip("[]' ") for name in listed[1].split(","))
        said = f"no configuration {configuration!r}" if configuration else "several configurations"
        raise UserError(f"{source} has {said}; there are {names}: choose one with data.config=NAME.") from None


def _hub_answers() -> bool:
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    if huggingface_hub.constants.HF_HUB_OFFLINE or urllib.request.getproxies():  # a proxy finds the hub for us
        return True
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True


def _local(path: Path, config: recipes.Data) -> dict[str, datasets.Dataset]:
    """Splits of a parquet file, or of a folder of parquet or image files at any depth."""
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{path} is neither a folder nor a parquet file: check --data.")
    files = []
    for at, folders, names in os.walk(path, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        files += [os.path.join(at, name) for name in names if not name.startswith(".")]
    tables = any(file.endswith(".parquet") for file in files)
    if config.config and not tables:
        raise UserError(f"{path} has no configurations: leave data.config out.")
    if tables or path.is_file():
        return _parquet(path, config.config)
    images = sorted(f for f in files if os.path.splitext(f)[1].lower() in IMAGE_FILES)
    return _folder(path, images, config.train_split, config.report_split)


def _parquet(path: Path, configuration: str | None) -> dict[str, datasets.Dataset]:
    try:
        if path.is_file():
            return dict(datasets.load_dataset("parquet", data_files={"train": str(path)}))
        return _load_dataset(str(path), configuration)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The parquet files in {path} cannot be read ({_one_line(error)}).") from None


def _folder(root: Path, files: list[str], train: str | None, report: str | None) -> dict[str, datasets.Dataset]:
    """Splits of image files: SPLIT/CLASS/*.jpg, SPLIT/*.jpg, CLASS/*.jpg or just *.jpg, at any depth.

    Beside splits, every other top folder is one too, for the user to name: train, report.
    """
    if not files:
        raise UserError(f"No images found under {root}: looked for {', '.join(sorted(IMAGE_FILES))} and *.parquet.")
    paths = [Path(file).relative_to(root).parts for file in files]
    tops = sorted({parts[0] for parts in paths if len(parts) > 1})
    splits = [top for names in SPLITS.values() for name in names for top in tops if top.lower() == name]
    # one class may be called test, so folders are splits only if one is for training, or if all have such names
    if train in tops or len(splits) == len(tops) or any(top.lower() in SPLITS["train"] for top in tops):
        splits += [top for top in tops if top in (train, report) and top not in splits]
    else:
        splits = []
    beside = [top for top in tops if splits and top not in splits]
    rows = {split: dict(image=[], label=[], **{FILE: []}) for split in [*splits, *beside] or ["train"]}
    loose = 0  # directly in the root, beside splits
    for file, parts in zip(files, paths, strict=True):
        inner = parts[1:] if splits else parts
        if not inner:
            loose += 1
            continue
        split = rows[parts[0] if splits else "train"]
        split["image"].append(file)
        split["label"].append(inner[0] if len(inner) > 1 else None)
        split[FILE].append(os.path.join(*inner))
    if beside or loose:
        _say_left_out(root, splits, {top: len(rows[top]["image"]) for top in beside}, loose)
    # labels are folders: there must be two or more, and every image of a split in one
    several = len({label for split in splits or rows for label in rows[split]["label"]} - {None}) > 1
    found = {}
    for split, columns in rows.items():
        features = {"image": datasets.Image(decode=False), FILE: datasets.Value("string")}
        if several and None not in columns["label"]:
            # with all names of the split, so that a held-out tenth of it has no class that the rest does not know
            features["label"] = datasets.ClassLabel(names=sorted(set(columns["label"])))
        columns = {name: columns[name] for name in features}
        found[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return found


def _say_left_out(root: Path, splits: list[str], beside: dict[str, int], loose: int) -> None:
    """Say how many images lie in no split: beside, by top folder; loose, directly in the root."""
    places = [f"{top}/" for top in beside] + ([f"{root.resolve().name}/ itself"] if loose else [])
    places = places[:5] + (["others"] if len(places) > 5 else [])
    count = sum(beside.values()) + loose
    say_once(f"Left out: {count:,} images in {_and(places)}, beside {_and([f'{s}/' for s in splits])}.")


def _and(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _labels(
    rows: datasets.Dataset, column: str | None, classes: list[str] | None, title: str
) -> tuple[Tensor | None, list[str] | None]:
    """(int64 labels, class names), or (None, None). Class numbers follow `classes` if given."""
    if column is None:
        return None, None
    feature, values = rows.features[column], rows[column][:]
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    missing = _missing(feature, values)
    if missing:
        if missing < len(values):
            say_once(f"{missing} of {len(values)} images of {title} have no label: all labels are left out.")
        return None, None
    if names is None:
        names = [str(value) for value in sorted(set(values))]
        values = list(map(str, values))
    else:
        values = [names[value] for value in values]
    classes = classes or names
    number = {name: i for i, name in enumerate(classes)}
    strangers = sorted(set(values) - number.keys())
    if strangers:
        raise UserError(
            f"{title} has classes that the training split lacks: {', '.join(strangers[:5])}. Remove them or add them."
        )
    return torch.tensor([number[value] for value in values]), classes


def _identity(rows: datasets.Dataset, image: str, split: str, channels: int) -> str:
    """What identifies the images before they are decoded: file names, sizes and times, or the table's fingerprint."""
    if FILE in rows.column_names:
        files = [(name, *_stat(cell["path"])) for name, cell in zip(rows[FILE][:], rows[image][:], strict=True)]
    else:
        files = rows._fingerprint
    return hashlib.sha256(json.dumps([files, split, image, channels]).encode()).hexdigest()


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:  # a dead link: decoding it will name it
        return 0, 0
    return found.st_size, found.st_mtime_ns


# -- decoding ---------------------------------------------------------------------------------------------------------


def _read(rows: datasets.Dataset, column: str, i: int) -> tuple[str, Image.Image | np.ndarray]:
    """(its name, the image of row i): only its header is read yet; or an array, uint8 (H, W) or (H, W, C).

    Raises UserError, naming the image.
    """
    row = rows[i]
    cell = dict(bytes=row[column]) if isinstance(row[column], bytes) else row[column]
    where = row.get(FILE) or (isinstance(cell, dict) and cell.get("path")) or f"row {i}"
    if isinstance(cell, dict):
        try:
            return where, Image.open(cell["path"] if cell.get("bytes") is None else io.BytesIO(cell["bytes"]))
        except Exception as error:
            raise _broken(where, error) from None
    try:
        array = np.asarray(cell)
    except ValueError:
        array = np.empty(0)
    if array.dtype.kind not in "ui" or array.ndim not in (2, 3) or not 0 <= array.min() <= array.max() <= 255:
        raise UserError(f"Image {where} is neither an image nor an array (H, W, C) of whole numbers from 0 to 255.")
    return where, array.astype(np.uint8)


def _channels(image: Image.Image | np.ndarray) -> int:
    if isinstance(image, np.ndarray):
        return 1 if image.ndim == 2 else image.shape[-1]
    return 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width)."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def _decode(read: Callable, channels: int, i: int) -> Tensor:
    """Image i as uint8 (C, H, W). Raises UserError, naming it."""
    where, image = read(i)
    if not isinstance(image, np.ndarray):
        try:
            if image.mode.startswith("I"):  # 16-bit grey: keep the upper byte, where PIL would clip
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            mode = PIL_MODES.get(channels, "RGB")
            image = np.array(image if image.mode == mode else image.convert(mode))
        except Exception as error:
            raise _broken(where, error) from None
    image = torch.from_numpy(image)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    if len(image) != channels:
        raise UserError(f"Image {where} has {len(image)} channels, not {channels}: set data.channels.")
    return image.contiguous()


def _photo(decode: Callable, kept: Tensor | None, i: int) -> Tensor:
    """Image i of those kept, decoded."""
    return decode(i if kept is None else int(kept[i]))


def _advising(decode: Callable, i: int) -> Tensor:
    """Image i, decoded. Raises UserError, naming it and the remedy."""
    try:
        return decode(i)
    except UserError as error:
        raise _advised(error) from None


def _broken(where: str, error: Exception) -> UserError:
    reason = "it is in no known format" if isinstance(error, UnidentifiedImageError) else _one_line(error)
    return UserError(f"Image {where} cannot be decoded ({reason}).")


def _advised(error: UserError) -> UserError:
    return UserError(f"{error} Mend or remove it, or pass data.skip_broken=true.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _probe(read: Callable, n: int, skip_broken: bool, title: str) -> tuple[int, tuple[int, int] | None]:
    """(channels, the size that all share or None), from the headers of some of the n images, spread evenly.

    Raises UserError for a broken one; if those are to be skipped, when all are.
    """
    tried = np.linspace(0, n - 1, min(n, PROBE)).astype(int).tolist()
    good, error = [], None
    for i in tried:
        try:
            good.append(read(i)[1])
        except UserError as e:
            error = e
            if not skip_broken:
                raise _advised(error) from None
    if not good:
        raise UserError(f"None of {len(tried)} images tried of {title} can be decoded; the last: {error}")
    sizes = set(map(_size, good))
    return max(map(_channels, good)), sizes.pop() if len(sizes) == 1 else None


def _decode_all(decode: Callable, n: int, shape: tuple[int, int, int] | None, skip_broken: bool) -> dict:
    """All images of one shape, decoded by threads. Without a shape they are only looked through for broken ones.

    Returns images: uint8 (N, *shape), or None if there is no shape or not all have it; kept: int64 (N,), which of the n
    these are, or None for all; broken: why the others are not; digest of the images. Raises UserError for a broken
    image, unless they are to be skipped.
    """
    images = None if shape is None else torch.empty(n, *shape, dtype=torch.uint8)

    def block(start: int) -> tuple[list[tuple[int, UserError]], bool]:
        broken, alike = [], shape is not None
        for i in range(start, min(start + 64, n)):
            try:
                pixels = decode(i)
            except UserError as error:
                broken.append((i, error))
                continue
            if alike and pixels.shape == shape:
                images[i] = pixels
            else:
                alike = False
        return broken, alike

    broken, alike = [], True
    with ThreadPoolExecutor(min(8, cores())) as pool:  # more would wait for each other
        for bad, same in pool.map(block, range(0, n, 64)):
            broken += bad
            alike &= same
            if not skip_broken and (broken or not alike):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    kept = None
    if broken:
        if not skip_broken:
            raise _advised(broken[0][1])
        if len(broken) == n:
            raise UserError(f"None of the {n} images can be decoded; the first: {broken[0][1]}")
        kept = torch.tensor(sorted(set(range(n)) - {i for i, _ in broken}))
    if not alike:
        images = None
    elif kept is not None:
        images = images[kept]
    digest = None if images is None else _digest(images)
    return dict(images=images, kept=kept, broken=[str(error) for _, error in broken], digest=digest)


def _cached(identity: str, make: Callable[[], dict], announcement: str) -> dict:
    """What make() returns, made once per machine and kept on disk; its tensors are mapped, not read.

    Raises UserError if the cache cannot be written or read.
    """
    folder = Path(os.environ.get("SSL_VIT_CACHE") or Path.home() / ".cache" / "ssl_vit")
    file = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w") as lock:  # the other processes wait here, before any group starts
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                say(announcement)
                _save(make(), file)
    except OSError as error:
        raise UserError(
            f"Cannot keep decoded images in {folder} ({_one_line(error)}): name a folder with room in SSL_VIT_CACHE, "
            "or set data.cache_gb=0."
        ) from None
    try:
        return torch.load(file, mmap=True, weights_only=True)
    except Exception as error:  # torch's readers raise a dozen types for a damaged file
        raise UserError(f"The decoded images in {file} are damaged ({_one_line(error)}): delete the file.") from None


def _save(made: dict, file: Path) -> None:
    """Write a file that is there whole or not at all. Raises OSError if it cannot."""
    partial = file.with_suffix(".partial")
    try:
        with open(partial, "wb") as stream:
            torch.save(made, stream)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch's writer may have a RuntimeError for a full disk
        partial.unlink(missing_ok=True)
        raise OSError(str(error)) from None


def _digest(images: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(images.numpy())).hexdigest()


def _fingerprint(content: str, labels: Tensor | None) -> str:
    """What the images and labels are, in 16 hex digits."""
    own = b"" if labels is None else labels.cpu().numpy().tobytes()
    return hashlib.sha256(content.encode() + own).hexdigest()[:16]


def _mean_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Per channel, in [0, 1], to four digits. images: uint8 (N, C, H, W), on the CPU."""
    total = squares = torch.zeros(images.shape[1], dtype=torch.float64)
    for part in images.split(max(1, 2**22 // images[0].numel())):  # no float copy of the whole set
        pixels = part.transpose(0, 1).flatten(1).double()
        total, squares = total + pixels.sum(1), squares + pixels.square().sum(1)  # whole numbers below 2^53: exact
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return [round(m, 4) for m in (mean / 255).tolist()], [max(round(s, 4), 1e-3) for s in (std / 255).tolist()]
