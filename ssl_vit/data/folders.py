"""A folder of image files → the splits in it, every real file once, and none of the training images in another split.

- Folders: SPLIT/CLASS/*.jpg, SPLIT/*.jpg, CLASS/*.jpg or just *.jpg, at any depth; a folder whose only folder holds
  the splits (as archives unpack) is that folder.
- Links: a folder or file that is reached twice, by links or hard links, counts once: at its real place if that is
  under the folder.
- Masks: files in masks/ beside images/ are the classes of those images' pixels, and no images (masks.take).
- Copies: files with the same bytes stay in their split, as published sets have them, but leave the training split where
  another split has them too, and are held out together.
"""

import csv
import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from ssl_vit.data import copies, masks
from ssl_vit.data.decoding import FILE, FIRST, SIZE, TIME
from ssl_vit.data.pixels import SUFFIXES
from ssl_vit.errors import UserError, listed, plural, say, say_once

TABLES = ("metadata.csv", "metadata.jsonl")  # of labels
QUIET = 5  # seconds for which files are listed without a word
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class File:
    """An image file as it was reached. key: what it really is, (device, inode)."""

    path: str
    size: int
    time: int
    key: tuple
    linked: bool


@dataclass
class Found:
    """What lies under a folder. links: to folders that count already; others: files that are no images, by suffix."""

    images: list[File] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # *.parquet
    labels: list[str] = field(default_factory=list)  # TABLES
    unread: list[str] = field(default_factory=list)  # tables of other names
    links: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    hidden: int = 0
    closed: list[str] = field(default_factory=list)  # folders that may not be read


def walk(root: Path) -> Found:
    """All files under a folder, links followed, every real folder once.

    Raises UserError for a name not in UTF-8, and if the folder may not be read.
    """
    found = Found()
    above = {_key(parent) for parent in root.resolve().parents}
    seen, folders = set(), [str(root)]
    links: list[str] = []
    speaks = time.monotonic() + QUIET
    while folders or links:  # real folders first, so that a link to one is the one left out
        at = folders.pop() if folders else links.pop(0)
        key = _key(at)
        if key in seen or key in above:
            found.links.append(at)
            continue
        seen.add(key)
        if time.monotonic() > speaks:
            speaks = math.inf
            say(f"Listing the files under {root}: {len(found.images):,} images so far.")
        try:
            entries = list(os.scandir(at))
        except PermissionError as error:
            if at == str(root):
                raise UserError(f"The folder {root} may not be read ({error.strerror}): check --data.") from None
            found.closed.append(at)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                found.hidden += 1
            elif _is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.path)
            else:
                _add(found, entry)
    if found.closed:
        say_once(f"Left out: {len(found.closed):,} folder(s) that may not be read; the first: {found.closed[0]}.")
    found.images.sort(key=lambda file: file.path)
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _key(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _add(found: Found, entry: os.DirEntry) -> None:
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix == ".parquet":
        found.tables.append(entry.path)
    elif entry.name in TABLES:
        found.labels.append(entry.path)
    elif suffix not in SUFFIXES:
        if suffix in (".csv", ".tsv", ".jsonl"):
            found.unread.append(entry.path)
        found.others[suffix or "without a suffix"] += 1
    else:
        try:
            entry.path.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"The name of the file {os.fsencode(entry.path)!r} is not in UTF-8: rename it (convmv renames many)."
            ) from None
        try:
            status = entry.stat()
            found.images.append(
                File(
                    entry.path,
                    status.st_size,
                    status.st_mtime_ns,
                    (status.st_dev, status.st_ino),
                    entry.is_symlink(),
                )
            )
        except OSError:  # a dead link: decoding will report it
            found.images.append(File(entry.path, 0, 0, (entry.path,), True))


def splits(
    root: Path, found: Found, train: str | None, report: str | None, label: str | None, apart: bool
) -> tuple[dict[str, datasets.Dataset], dict]:
    """(rows by split, what was left out and why). Every other top folder beside splits is one if the user names it.
    apart: whether training images leave the training split if they are in another, too.

    Raises UserError where there are no images, or where splits lie too deep to be told from classes.
    """
    if not found.images:
        raise UserError(
            f"No images found under {root}: looked for {', '.join(sorted(SUFFIXES))} and *.parquet"
            + (f"; there are {counts(found.others)}." if found.others else ".")
        )
    found.images, mask_of, unmatched = masks.take(root, found.images)
    root, paths, names = _descend(root, [masks.parts(root, file.path) for file in found.images], train, report)
    tops = sorted({parts[0] for parts in paths if len(parts) > 1})
    beside = [top for top in tops if names and top not in names]
    members: dict[str, list[int]] = {split: [] for split in [*names, *beside] or ["train"]}
    loose = 0  # directly in the root, beside splits
    for i, parts in enumerate(paths):
        if names and len(parts) == 1:
            loose += 1
        else:
            members[parts[0] if names else "train"].append(i)
    if beside or loose:
        _say_left_out(root, names, {top: len(members[top]) for top in beside}, loose)
    left_out = dict(beside_splits=sum(len(members[top]) for top in beside) + loose, masks_without_image=unmatched)
    own = train or next((s for kind in SPLITS["train"] for s in names if s.lower() == kind), None)
    firsts = _once(found, members, own, judges(names, own, report) if apart else [], left_out)

    tables = _tables(found, label, bool(names))
    inner = [parts[1:] if names else parts for parts in paths]
    classes = {split: [inner[i][0] if len(inner[i]) > 1 else None for i in chosen] for split, chosen in members.items()}
    # labels are folders: there must be two or more, and every image of a split in one
    several = len({label for split in names or members for label in classes[split]} - {None}) > 1
    result = {}
    for split, chosen in members.items():
        columns = {
            "image": [found.images[i].path for i in chosen],
            FILE: [os.path.join(*inner[i]) for i in chosen],
            SIZE: [found.images[i].size for i in chosen],
            TIME: [found.images[i].time for i in chosen],
        }
        features = {"image": datasets.Image(decode=False), FILE: datasets.Value("string")}
        features |= dict.fromkeys((SIZE, TIME), datasets.Value("int64"))
        if any(i in firsts for i in chosen):
            columns[FIRST] = [os.path.join(*inner[firsts.get(i, i)]) for i in chosen]
            features[FIRST] = datasets.Value("string")
        if mask_of:
            columns["mask"] = [mask_of.get(found.images[i].path) for i in chosen]
            features["mask"] = datasets.Image(decode=False)
        if several and None not in classes[split]:
            # with all names of the split, so that a held-out tenth of it has no class that the rest does not know
            columns["label"] = classes[split]
            features["label"] = datasets.ClassLabel(names=sorted({name for name in classes[split] if name is not None}))
        for column, values in tables.items():
            own_values = [values.get(os.path.realpath(found.images[i].path)) for i in chosen]
            if any(value is not None for value in own_values):  # they win over folders, as in `datasets`
                if columns.pop("label", None) and features.pop("label"):
                    say_once(f"{root}: labels are those of {_names(found.labels)}, not the names of folders.")
                columns[column], features[column] = own_values, datasets.Value("string")
                break
        result[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return result, dict(
        files=len(found.images),
        other_files=dict(found.others),
        hidden=found.hidden,
        links_to_folders_that_count_already=found.links,
        folders_that_may_not_be_read=found.closed,
        left_out={reason: count for reason, count in left_out.items() if count},
        copies_within_a_split=len(firsts),
        splits={split: len(rows) for split, rows in result.items()},
    )


def judges(splits: Iterable[str], train: str | None, report: str | None) -> list[str]:
    """The splits that no training image may be in: the one that is reported on or, where the user names none, all that
    may be. Others beside them, such as trainval or all, are unions of them."""
    others = [name for name in splits if name != train]
    if report in others:
        return [report]
    return [name for name in others if name.lower() in (*SPLITS["val"], *SPLITS["test"])]


def _named(tops: Iterable[str], train: str | None, report: str | None) -> list[str]:
    """Which of these folders are splits. One class may be called test: all are, or one is for training, or none is."""
    tops = sorted(tops)
    known = [top for names in SPLITS.values() for name in names for top in tops if top.lower() == name]
    if train in tops or (tops and len(known) == len(tops)) or any(top.lower() in SPLITS["train"] for top in tops):
        return known + [top for top in tops if top in (train, report) and top not in known]
    return []


def _descend(
    root: Path, paths: list[tuple], train: str | None, report: str | None
) -> tuple[Path, list[tuple], list[str]]:
    """(the folder that holds the splits, the paths under it, its splits), or (root, paths, []) where there are none."""
    at, inner = root, paths
    while True:
        tops = {parts[0] for parts in inner if len(parts) > 1}
        names = _named(tops, train, report)
        if names:
            if at != root:
                say_once(f"{root}: its splits ({listed(names)}) lie in {at}/.")
            return at, inner, names
        if len(tops) != 1 or any(len(parts) == 1 for parts in inner):
            break
        at, inner = at / tops.pop(), [parts[1:] for parts in inner]
    folders = defaultdict(set)
    for parts in paths:
        for depth in range(1, len(parts) - 1):
            folders[parts[:depth]].add(parts[depth])
    for folder, inside in folders.items():
        kinds = {kind for kind, known in SPLITS.items() for name in inside if name.lower() in known}
        if "train" in kinds and len(kinds) > 1:
            raise UserError(
                f"{root} has no splits, but {Path(root, *folder)} has ({listed(sorted(inside)[:5])}): they would be "
                "mixed. Pass the folder that holds train and test as --data, or move them up (train/CLASS, test/CLASS)."
            )
    return root, paths, []


def _once(found: Found, members: dict[str, list[int]], train: str | None, others: list[str], left_out: dict) -> dict:
    """Take from `members` the files that count already. Returns {index of a copy: index of the first with its bytes}.

    left_out: gets the counts. others: the splits that no training image may be in.
    """
    files = found.images
    real: dict[tuple, int] = {}
    for split, chosen in members.items():
        kept: dict[tuple, int] = {}
        for i in sorted(chosen, key=lambda i: (files[i].linked, files[i].path)):
            kept.setdefault(files[i].key, i)
        members[split] = sorted(kept.values())
        left_out["links"] = left_out.get("links", 0) + len(chosen) - len(kept)
        real |= {files[i].key: i for i in reversed(members[split])}
    links = (("image", left_out["links"]), ("folder", len(found.links)))
    again = [f"{plural(n, 'link')} to {kind}s" for kind, n in links if n]
    if again:
        say_once(f"Left out: {listed(again)} already read; every file counts once.")

    unique = [files[i] for i in sorted(real.values())]
    same = copies.of_files([file.path for file in unique], [(file.size, file.time) for file in unique])
    firsts = {unique[i].key: unique[first].key for i, first in same.items()}
    group = {files[i].key: firsts.get(files[i].key, files[i].key) for i in real.values()}
    if train in members and others:
        outside = {group[files[i].key]: split for split in reversed(others) for i in members.get(split, [])}
        stays = [i for i in members[train] if group[files[i].key] not in outside]
        leak = len(members[train]) - len(stays)
        if leak:
            lost = next(i for i in members[train] if group[files[i].key] in outside)
            there = {outside[group[files[i].key]] for i in set(members[train]) - set(stays)}
            copies.tell(train, leak, len(stays), listed(sorted(there)), files[lost].path)
        members[train], left_out["also_in_another_split"] = stays, leak
    place = {files[i].key: i for chosen in members.values() for i in reversed(chosen)}
    return {
        i: place[group[files[i].key]]
        for chosen in members.values()
        for i in chosen
        if group[files[i].key] != files[i].key and group[files[i].key] in place
    }


def _names(paths: Iterable[str]) -> str:
    """The names of files, each once, up to four."""
    names = sorted({os.path.basename(path) for path in paths})
    return listed(names[:4] + (["others"] if len(names) > 4 else []))


def _tables(found: Found, label: str | None, split: bool) -> dict[str, dict[str, str | None]]:
    """{label column: {real path: label}} of all tables beside images. split: whether folders are splits."""
    if found.unread:
        say_once(
            f"Not read: {_names(found.unread)}. Splits are folders (train/, test/), and labels folders in these, or a "
            "metadata.csv with the columns file_name and label (docs/data.md)."
        )
    tables: dict[str, dict[str, str | None]] = {}
    for path in sorted(found.labels):
        column, labels = _table(Path(path), label, split)
        tables.setdefault(column, {}).update(labels)
    named = {path for labels in tables.values() for path in labels}
    lost = len(named - {os.path.realpath(file.path) for file in found.images}) if named else 0
    if lost:
        say_once(f"{lost:,} of {len(named):,} images named in {_names(found.labels)} are not there.")
    return tables


def _table(file: Path, label: str | None, split: bool) -> tuple[str, dict[str, str | None]]:
    """(label column, {real path: label}) of a metadata.csv or metadata.jsonl beside images, as of `datasets`."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".csv":
                rows = list(csv.DictReader(stream))
            else:
                rows = [json.loads(line) for line in stream if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no object with names and values")
        columns = list(rows[0]) if rows else []
    except (OSError, ValueError, csv.Error, TypeError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}): mend or remove it.") from None
    parts = sorted({str(row["split"]) for row in rows if row.get("split")})
    if len(parts) > 1 and not split:
        raise UserError(
            f"{file} has a column split ({', '.join(parts[:4])}), which is not read, and test images would be trained "
            "on: move the images to a folder for each split, such as train/ and test/, or remove the column."
        )
    known = [c for c in (label, "label", "labels", "fine_label", "class") if c is not None and c in columns]
    if "file_name" not in columns or not known:
        say_once(
            f"No labels are read from {file}: its columns are {', '.join(columns)}; it needs file_name and label, or "
            "data.label_column=COLUMN."
        )
        return "label", {}
    if any(isinstance(row.get(known[0]), list | dict) for row in rows):
        raise UserError(f"{file} has several labels per image in {known[0]!r}: one class per image is supported.")
    for number, row in enumerate(rows, 1):
        if not row.get("file_name"):
            raise UserError(f"{file} names no file_name in its row {number}: mend or remove that row.")
    return known[0], {os.path.realpath(file.parent / str(row["file_name"])): _word(row.get(known[0])) for row in rows}


def _word(value: object) -> str | None:
    """A label as a word; "", null, NaN and −1 are none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = "" if value is None else str(value).strip()
    return None if word in ("", "-1", "nan", "NaN", "null") else word


def _say_left_out(root: Path, splits: list[str], beside: dict[str, int], loose: int) -> None:
    """Say how many images lie in no split: beside, by top folder; loose, directly in the root."""
    places = [f"{top}/" for top in beside] + ([f"{root.resolve().name}/ itself"] if loose else [])
    places = places[:5] + (["others"] if len(places) > 5 else [])
    count = sum(beside.values()) + loose
    say_once(f"Left out: {count:,} images in {listed(places)}, beside {listed([f'{s}/' for s in splits])}.")


def counts(kinds: dict[str, int]) -> str:
    """ ".md 3, .txt 1 and others": the five most frequent."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{kind} {count:,}" for kind, count in most[:5]) + (" and others" if len(most) > 5 else "")
