"""Where rows come from: a name, a path or owner/name on the hub → a table of one split, its image and label column."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor

from ssl_vit import hub
from ssl_vit import recipe as recipes
from ssl_vit.data import copies, folders
from ssl_vit.data.decoding import FILE, FIRST, OWN
from ssl_vit.data.folders import SPLITS, judges
from ssl_vit.data.pixels import one_line
from ssl_vit.errors import NothingHeldOut, UserError, listed, nearest, say_once
from ssl_vit.settings import known

# Known data sets by name: hub id, image and label column, report split, whether a flip keeps the label.
HUB = {
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "image", "label", "test", True),
    "cifar10": ("uoft-cs/cifar10", "img", "label", "test", True),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", "test", True),
    "tiny-imagenet": ("zh-plus/tiny-imagenet", "image", "label", "valid", True),
    "imagenet-1k": ("ILSVRC/imagenet-1k", "image", "label", "validation", True),
}
KNOWN = HUB | {known_set[0]: known_set for known_set in HUB.values()}  # by their hub ids too
NAMES = ("digits", *HUB)
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "images", "pixel_values"), ("label", "labels", "fine_label", "class")
# what `datasets` says before it lists the configurations of a set
CONFIGURATIONS = re.compile(r"(?:available configs|not found\. Available|[Cc]onfig(?:uration)?s in the cache): (.+)")


@dataclass
class Rows:
    """One split. label: its column, or None; flip: whether flips keep it; folders: what paths in cells are relative to.

    files: what identifies the tables on this disk; ledger: what was found and left out, beside these rows; whole: the
    split that these rows are a part of, whose classes are theirs, be they in this part or not; numbers: their places in
    the split as it is stored, int64 (n,), or None if they are all of it.
    """

    rows: datasets.Dataset
    split: str
    image: str
    label: str | None
    flip: bool
    folders: tuple[str, ...]
    files: str
    ledger: dict
    whole: datasets.Dataset
    numbers: np.ndarray | None


def place(name: str) -> Path:
    """The path that a name may be, with ~ for the home folder."""
    return Path(os.path.expanduser(name))


def rows_of(config: recipes.Data, role: str, apart: bool) -> Rows:
    """The rows of one split: "train", without images of the report split if it is to be kept apart, or "report".

    Raises UserError if they do not exist.
    """
    unknown = (config.name, None, None, None, True)
    named = config.name in NAMES
    local = config.name and not named and place(config.name).exists()
    if named and Path(config.name).exists():
        say_once(f"{config.name} is the known set; for the folder of that name here, pass --data ./{config.name}.")
    hub_id, image, label, report, flip = unknown if local else KNOWN.get(config.name, unknown)
    image, label, report = config.image_column or image, config.label_column or label, config.report_split or report
    lookup: tuple[str, ...] = ()
    files, ledger, stays = "", dict[str, Any](), dict[str, np.ndarray]()
    if local:
        splits, lookup, files, ledger = _local(place(config.name), config, apart)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_id):
        splits = _hub(hub_id, config.config)
    elif "/" in config.name or config.name.startswith("~"):
        raise UserError(f"There is no folder or file {config.name!r}: check --data.")
    else:
        raise UserError(
            f"Unknown data {config.name!r}.{nearest(config.name, NAMES)} Give one of {', '.join(NAMES)}, "
            "a folder of images or parquet files, or owner/name on the Hugging Face hub."
        )
    if not any(FILE in part.column_names for part in splits.values()):  # image folders are separated already
        splits, left_out, stays = _once(splits, config.train_split, report, image, apart)
        ledger = ledger | left_out
    split, rows, chosen = _choose_split(splits, config, role, report, label)
    stored = split if split in splits else split.rpartition(" (")[0]
    whole, numbers = splits[stored], stays.get(stored)
    if chosen is not None:
        numbers = chosen if numbers is None else numbers[chosen]
    ledger = ledger | dict(splits={name: len(part) for name, part in splits.items()})
    columns = [c for c in rows.column_names if c not in OWN]
    image = image or _image_column(rows)
    label = label or _label_column(rows)
    for key, column in (("image", image), ("label", label)):
        if column not in columns and (key == "image" or column is not None):
            raise UserError(
                f"{config.name} has no {key} column{'' if column is None else f' {column!r}'}; its columns are "
                f"{', '.join(columns)}: choose one with data.{key}_column=…"
            )
    if label is not None and (reason := _no_class(rows, label)):
        raise UserError(
            f"Column {label!r} of {config.name} holds no class per image but {reason}: choose one with "
            "data.label_column=…"
        )
    if label is None:
        for column in (c for c in LABEL_COLUMNS if c in columns):
            say_once(f"Column {column!r} of {config.name} is not read as labels: it holds {_no_class(rows, column)}.")
    for name, feature in rows.features.items():  # of images and masks
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return Rows(rows, split, known(image), label, flip, lookup, files, ledger, whole, numbers)


def _once(
    splits: dict[str, datasets.Dataset], train: str | None, report: str | None, image: str | None, apart: bool
) -> tuple[dict[str, datasets.Dataset], dict, dict[str, np.ndarray]]:
    """(splits of tables, with FIRST and, if they are kept apart, without training images that are also in another; what
    was left out; the places of the rows that stay in a split, if any was left out)."""
    own = train or _training(splits)
    column = image or (own in splits and _image_column(splits[own])) or ""
    judged = judges(splits, own, report) if apart else []
    same = copies.of_cells(splits, column)
    if not same:
        return splits, {}, {}
    firsts: dict[str, dict[int, tuple]] = {name: {} for name in splits}
    for (name, row), first in same.items():
        firsts[name][row] = first
    parts, left_out, places = dict(splits), {}, {}
    for name, rows in splits.items():
        if any(first[0] == name for first in firsts[name].values()):
            keys = [str(firsts[name][i][1]) if i in firsts[name] else str(i) for i in range(len(rows))]
            parts[name] = rows.add_column(FIRST, keys)
    if own in splits:
        outside = {same.get((name, row), (name, row)): name for name in judged[::-1] for row in firsts[name]}
        outside |= {first: first[0] for first in same.values() if first[0] in judged}
        there = {i: outside[key] for i in range(len(splits[own])) if (key := same.get((own, i), (own, i))) in outside}
        if there:
            stays = sorted(set(range(len(splits[own]))) - set(there))
            copies.tell(own, len(there), len(stays), listed(sorted(set(there.values()))), f"row {min(there)}")
            parts[own], left_out = parts[own].select(stays), dict(also_in_another_split=len(there))
            places[own] = np.array(stays)
    copied = sum(first[0] == name for (name, _), first in same.items())
    return parts, dict(left_out=left_out, copies_within_a_split=copied), places


def _training(splits: dict[str, datasets.Dataset]) -> str | None:
    """The training split, where the user names none."""
    named = (s for name in SPLITS["train"] for s in splits if s.lower() == name)
    return next(named, next(iter(splits)) if len(splits) == 1 else None)


def _image_column(rows: datasets.Dataset) -> str | None:
    """The column that holds the images, where the user names none."""
    columns = [c for c in rows.column_names if c not in OWN]
    kinds = [c for c in columns if isinstance(rows.features[c], datasets.Image)]
    return next((c for c in (*IMAGE_COLUMNS, *kinds) if c in columns), None)


def _no_class(rows: datasets.Dataset, column: str) -> str | None:
    """What a column holds instead of one class per image: None where it holds classes.

    Classes are named classes, words, whole numbers and true/false; numbers with a point where all are whole, which is
    what pandas makes of whole numbers with gaps.
    """
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return None
    if not isinstance(feature, datasets.Value):
        return "lists (several labels per image are not supported)"
    if re.match(r"u?int|bool|(large_)?string|null", feature.dtype):
        return None
    if feature.dtype.startswith("float"):
        broken = next((v for v in rows[column][:] if not _is_none(v) and not float(v).is_integer()), None)
        return None if broken is None else f"numbers such as {broken:g}"
    return feature.dtype


def _label_column(rows: datasets.Dataset) -> str | None:
    """The column that holds the labels, where the user names none."""
    return next((c for c in LABEL_COLUMNS if c in rows.column_names and _no_class(rows, c) is None), None)


def _is_none(value: object) -> bool:
    """Whether a label is none: null, NaN, −1 or an empty word, in any column."""
    return value in (None, -1, "") or (isinstance(value, float) and math.isnan(value))


def _labelled(rows: datasets.Dataset, label: str | None) -> bool:
    """Whether any image has a label in this column, or in the one that would be taken."""
    column = label or _label_column(rows)
    return column in rows.column_names and not all(map(_is_none, rows[column][:]))


def _choose_split(
    splits: dict[str, datasets.Dataset], config: recipes.Data, role: str, report: str | None, label: str | None
) -> tuple[str, datasets.Dataset, np.ndarray | None]:
    """The training split, or the report split: where there is none, a hashed tenth of the former, or
    nothing if it has no labels. With the places of the rows in the split if they are a part of it."""

    def named(*kinds: str) -> str | None:
        return next((s for kind in kinds for name in SPLITS[kind] for s in splits if s.lower() == name), None)

    train = config.train_split or _training(splits)
    if report is None:
        report, other = named("test", "val"), named("val")
        if role == "report" and report is not None and other is not None and train not in (report, other):
            if not _labelled(splits[report], label) and _labelled(splits[other], label):
                say_once(f"The {report} split of {config.name} has no labels: accuracies are reported on {other}.")
                report = other
    for key, split in (("train_split", train), ("report_split", report)):
        if split not in splits and (key == "train_split" or split is not None):
            raise UserError(
                f"{config.name} has no {'training split' if split is None else f'split {split!r}'}; its splits are "
                f"{', '.join(splits)}: choose with data.{key}=…"
            )
    train = known(train)
    if report is not None and report != train:
        return (train, splits[train], None) if role == "train" else (report, splits[report], None)
    rows = splits[train]
    if not _labelled(rows, label):  # nothing could be reported on them
        if role == "train":
            return train, rows, None
        raise UserError(
            f"The images of {config.name} have no labels to evaluate with, and none are set apart for tests. If "
            "another column holds them, train a run with data.label_column=COLUMN train.steps=0 and pass --data RUN; "
            "else look at the images by eval/embed.py, or pass labelled ones as --data."
        )
    # by the file's name if it has one, so that new files move none; copies lie where their first lies
    column = next((c for c in (FIRST, FILE) if c in rows.column_names), None)
    keys = rows[column][:] if column else map(str, range(len(rows)))
    held_out = np.array([int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 10 == 0 for key in keys])
    chosen = np.flatnonzero(held_out if role == "report" else ~held_out)
    if len(chosen) == 0:
        raise NothingHeldOut(f"{config.name} has {len(rows)} image(s), too few to hold a tenth of them out for {role}.")
    if role == "train":
        say_once(f"{config.name} has no test split: a hashed tenth ({held_out.sum()} images) is held out for reports.")
    return f"{train} ({'hashed tenth' if role == 'report' else 'the other nine tenths'})", rows.select(chosen), chosen


def _hub(hub_id: str, configuration: str | None) -> dict[str, datasets.Dataset]:
    if not hub.answers():  # else its client would retry for 23 s
        hub.stay_offline()
    try:
        return _load_dataset(hub_id, configuration)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises a dozen types of its own for what is one thing to the user
        _refuse_cache(error)
        raise UserError(
            f"There is no folder {hub_id!r} here, and the Hugging Face hub did not give it ({type(error).__name__}: "
            f"{one_line(error)}). Check the name, the network and `hf auth login`, or download the images elsewhere "
            "and pass --data PATH."
        ) from None


def _load_dataset(
    source: str, configuration: str | None, title: str | None = None, **options
) -> dict[str, datasets.Dataset]:
    """Splits of a set on the hub or in a folder. title: what the user calls it, if not so.

    Raises UserError if it has other configurations than asked for.
    """
    try:
        return dict(datasets.load_dataset(source, configuration, **options))
    except ValueError as error:
        listed = CONFIGURATIONS.search(str(error))
        if listed is None:
            raise
        names = ", ".join(name.strip("[]' ") for name in listed[1].split(","))
        problem = f"no configuration {configuration!r}" if configuration else "several configurations"
        raise UserError(
            f"{title or source} has {problem}; there are {names}: choose one with data.config=NAME."
        ) from None


def _local(
    path: Path, config: recipes.Data, apart: bool
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...], str, dict]:
    """(splits of a parquet file, or a folder of parquet or image files; the folders, files and ledger of Rows)"""
    if path.is_file() and path.suffix != ".parquet":
        raise UserError(f"{path} is neither a folder nor a parquet file: check --data.")
    if path.is_file():
        files = _status(path, [str(path)])
        return _parquet(path, config.config, files), (str(path.parent),), files, dict(files=1)
    if (path / "recipe.yaml").exists():
        raise UserError(f"{path} is a run, and its images lie elsewhere: name those, or a folder, as --data.")
    saved = all((path / name).exists() for name in ("state.json", "dataset_info.json"))
    if saved or (path / "dataset_dict.json").exists():
        raise UserError(
            f"{path} was written by save_to_disk of the library datasets, which is not read: write parquet instead, "
            'with ds.to_parquet("FOLDER/train.parquet") for each split.'
        )
    found = folders.walk(path)
    tables = [file for file in found.tables if Path(file).name != "metadata.parquet"]
    # images beside their table are in its cells; a stray table among more images is none
    if tables and (len(tables) >= len(found.images) or config.config or _has_images(tables[0], config.image_column)):
        beside = tuple(dict.fromkeys([str(path), *map(os.path.dirname, sorted(tables))]))
        ledger = dict(files=len(tables), other_files=dict(found.others), image_files_beside=len(found.images))
        used = [*tables, str(path / "README.md")]
        files = _status(path, used)
        return _parquet(path, config.config, files, _apart_from_images(path, used, files)), beside, files, ledger
    if config.config:
        raise UserError(f"{path} has no configurations: leave data.config out.")
    found.others.update([".parquet"] * len(found.tables))
    splits, ledger = folders.splits(path, found, config.train_split, config.report_split, config.label_column, apart)
    return splits, (), "", ledger


def _apart_from_images(root: Path, files: list[str], identity: str) -> Path:
    """A folder of links to the tables of a folder and its README.md: `datasets` reads what most files of a folder are,
    and images beside their tables would be taken for the set, their folders for its classes."""
    place = hashlib.sha256(f"{root.resolve()} {identity}".encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ssl_vit" / "tables" / place / root.resolve().name
    try:
        for file in filter(os.path.exists, files):
            link = folder / os.path.relpath(file, root)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                link.unlink(missing_ok=True)
                with contextlib.suppress(FileExistsError):  # another process was faster
                    link.symlink_to(os.path.realpath(file))
    except OSError as error:
        _refuse_cache(error)
        raise
    return folder


def _has_images(table: str, column: str | None) -> bool:
    """Whether a parquet file has a column that may hold images, or the one that is named."""
    try:
        names = set(pyarrow.parquet.read_schema(table).names)
    except (OSError, pyarrow.ArrowException):  # reading it will say so
        return True
    return bool(names & {*IMAGE_COLUMNS, column})


def _status(root: Path, files: list[str]) -> str:
    """What identifies tables: their places under the root, sizes and times."""
    status = [(os.path.relpath(file, root), os.stat(file)) for file in sorted(files) if os.path.exists(file)]
    identity = json.dumps([(file, found.st_size, found.st_mtime_ns) for file, found in status])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _parquet(
    path: Path, configuration: str | None, files: str, folder: Path | None = None
) -> dict[str, datasets.Dataset]:
    """Splits of a file, or of a folder, whose tables are in `folder` alone."""
    # `datasets` takes a folder with a README.md for another of its name, and old files for new ones, in its own cache
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "ssl_vit" / files
    try:
        if folder is None:
            return dict(datasets.load_dataset("parquet", data_files={"train": str(path)}, cache_dir=str(cache)))
        return _load_dataset(str(folder), configuration, str(path), cache_dir=str(cache))
    except UserError:
        raise
    except Exception as error:
        _refuse_cache(error)
        cause: BaseException = error  # what datasets says of any failure is that there was one
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"The parquet files in {path} cannot be read ({one_line(cause)}).") from None


def _refuse_cache(error: BaseException) -> None:
    """Raises UserError if this failure is not the set's: the library `datasets` cannot write its own cache."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"There is no room in {cache}, to which the library datasets copies all images ({cause.strerror}): "
                "make room, or name another place in HF_HOME or HF_DATASETS_CACHE."
            ) from None
        cause = cause.__cause__ or cause.__context__
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise UserError(
            f"The folder in which the library datasets keeps its files, {cache}, cannot be written ({error.strerror}): "
            "name another one in HF_HOME or HF_DATASETS_CACHE."
        ) from None


def _refuse_fractions(values: list, column: str) -> None:
    """Raises UserError for labels that are numbers with fractions, also as words: they are no classes."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:  # some are no numbers
        return
    fraction = next(
        (v for v, number in zip(values, numbers, strict=True) if math.isfinite(number) and number % 1), None
    )
    if fraction is not None:
        raise UserError(
            f"The labels in {column!r} are numbers with fractions, such as {fraction}, and not classes: name another "
            "column by data.label_column, or write classes into it."
        )


def _words(rows: datasets.Dataset, column: str) -> tuple[list[str | None], list[str]]:
    """(the label of each row in words, or None; all labels in order)"""
    feature, values = rows.features[column], rows[column][:]
    values = [None if _is_none(value) else value for value in values]
    if isinstance(feature, datasets.ClassLabel):
        return [None if value is None else feature.names[value] for value in values], feature.names
    _refuse_fractions([value for value in values if value is not None], column)
    if any(isinstance(value, float) for value in values):
        values = [None if value is None else int(value) for value in values]
    names = [str(value) for value in sorted({value for value in values if value is not None})]
    return [None if value is None else str(value) for value in values], names


def labels_of(found: Rows, classes: list[str] | None, title: str) -> tuple[Tensor | None, list[str] | None]:
    """(int64 labels, −1 where an image has none; class names), or (None, None). Numbers follow `classes` if given."""
    if found.label is None:
        return None, None
    values, _ = _words(found.rows, found.label)
    if not any(value is not None for value in values):
        return None, None
    classes = classes or _words(found.whole, found.label)[1]
    number = {name: i for i, name in enumerate(classes)}
    strangers = sorted({value for value in values if value is not None} - number.keys())
    if strangers:
        raise UserError(
            f"{title} has classes that the training split lacks: {', '.join(strangers[:5])}. Remove them or add them."
        )
    return torch.tensor([-1 if value is None else number[value] for value in values]), classes
