"""Where rows come from: a name, a path or owner/name on the hub → a table of one split, its image and label column."""

import hashlib
import os
import re
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import huggingface_hub.constants
import numpy as np
import torch
from torch import Tensor

from ssl_vit import recipe as recipes
from ssl_vit.data.decoding import FILE, one_line
from ssl_vit.errors import UserError, nearest, say_once

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
# what `datasets` says before it lists the configurations of a set
CONFIGURATIONS = re.compile(r"(?:available configs|not found\. Available|[Cc]onfig(?:uration)?s in the cache): (.+)")


def rows_of(config: recipes.Data, role: str) -> tuple[datasets.Dataset, str, str, str | None, bool]:
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
            f"{one_line(error)}). Check the name, the network and `hf auth login`, or download the images elsewhere "
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
        raise UserError(f"The parquet files in {path} cannot be read ({one_line(error)}).") from None


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


def labels_of(
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
