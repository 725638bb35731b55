"""One split of a data set: its images, labels and what identifies them."""

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_vit import recipe as recipes
from ssl_vit import subsets
from ssl_vit.data import decoding, ledger, masks
from ssl_vit.data.pixels import JPEG, Rules
from ssl_vit.data.sources import Rows, labels_of, place, rows_of
from ssl_vit.errors import UserError, say_once
from ssl_vit.randomness import permutation
from ssl_vit.settings import known, pair
from ssl_vit.views import Photo


def _nameless() -> None:
    """The names of images that have none."""


@dataclass
class ImageSet:
    """One split. images: uint8 (N, C, H, W) if decoded, else None and `photo(i)` decodes one, uint8 (C, h, w)."""

    name: str
    split: str
    labels: Tensor | None  # int64 (N,), −1 where an image has none; None where none has any
    classes: list[str] | None
    fingerprint: str
    channels: int
    count: int
    size: tuple[int, int] | None  # (H, W), if the images share it
    images: Tensor | None = None
    photo: Callable[[int], Tensor] | None = None
    opened: Callable[[int], Photo] | None = None  # i → image i, decoded as small as its views allow: data.jpeg_draft
    flip: bool = True
    masks: Callable[[int], Tensor] | None = None  # i → the class of each pixel of image i, uint8 (H, W)
    names: Callable[[], list[str] | None] = _nameless  # the images' paths in order, or None if they have none
    numbers: np.ndarray | None = None  # their places in the split as it is stored; None: those of all of it
    range: tuple[float, float] | None = None  # black and white of values deeper than 8 bits
    ledger: dict = dataclasses.field(default_factory=dict)  # what was found, used and left out, and why

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
        """The subset of these images, int64 (M,) on the CPU, the only device of decoding processes."""
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(
            self,
            labels=labels,
            fingerprint=_fingerprint(self.fingerprint, chosen),
            count=len(chosen),
            images=None if self.images is None else self.images[chosen],
            photo=self.photo and functools.partial(decoding.photo, self.photo, chosen),
            opened=self.opened and functools.partial(decoding.photo, self.opened, chosen),
            masks=self.masks and functools.partial(decoding.photo, self.masks, chosen),
            names=functools.partial(_names, self.names, chosen),
            numbers=chosen.numpy() if self.numbers is None else self.numbers[chosen.numpy()],
            ledger=ledger.part(self.ledger, len(chosen), labels, self.classes),
        )

    def permuted(self) -> "ImageSet":
        """The same set as if it were stored with scrambled pixels: place i of every image shows what was at place p[i].

        p is one fixed permutation of all H·W places of the grid, the same for all images, channels, splits, seeds and
        runs; it depends on H·W alone. Views are made afterwards: a crop cuts permuted pixels, and where it is resized,
        unrelated ones are blended. So of an image's structure all values are kept and all neighbourhoods are lost, as a
        control for what needs them.
        Raises UserError if the images are not in memory, since they may differ in size then.
        """
        if self.images is None:
            raise UserError(
                f"data.permute_pixels=true needs images of one size that fit data.cache_gb, and those of {self.name} "
                f"({self.split}) differ in size or do not fit."
            )
        say_once(f"The pixels of {self.name} ({self.split}) are permuted, in all images alike (data.permute_pixels).")
        height, width = self.images.shape[-2:]
        order = torch.from_numpy(permutation(0, 0, height * width, "pixels"))
        return dataclasses.replace(
            self,
            images=self.images.flatten(2)[..., order].view_as(self.images),
            fingerprint=_fingerprint(f"{self.fingerprint} permuted", None),
        )

    def labelled(self) -> "ImageSet":
        """The images that have a label; the same set if all have one or none has."""
        if self.labels is None or bool((self.labels >= 0).all()):
            return self
        return self.part((self.labels >= 0).nonzero().flatten().cpu())

    def info(self) -> dict:
        """What the recipe needs to know: size, channels, mean and std in [0, 1], flip; range, if the set has one."""
        if self.images is not None:
            mean, std = _mean_std(self.images)
        elif self.channels == 3:  # ImageNet's, as in every codebase of the field
            mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        else:
            mean, std = [0.5] * self.channels, [0.25] * self.channels
        size = self.size and (self.size[0] if self.size[0] == self.size[1] else list(self.size))
        info = dict(img_size=size, in_chans=self.channels, mean=mean, std=std, hflip=self.flip)
        return info if self.range is None else info | dict(range=list(self.range))


def load(config: recipes.Data, role: str, classes: list[str] | None = None, apart: bool = True) -> ImageSet:
    """The images that `config` names. classes: the training set's, so that labels agree.

    role: "train"; "held out", what `data.hold_out` leaves out of it; or "report", the report split. apart: leave
    training images out that are in the report split too, which only those may be spared who judge nothing by it.
    Raises UserError for an unknown name, a missing path, an unreachable hub, an empty folder, a broken image.
    """
    whole = _load(config, "report" if role == "report" else "train", classes, apart)
    if config.hflip is not None:  # the recipe wins
        whole.flip = config.hflip
    if config.jpeg_draft and whole.images is not None and role != "report":
        raise UserError(
            f"data.jpeg_draft=true is for photos that are decoded anew for every view, and the images of {whole.name} "
            f"({whole.split}) are decoded once and kept: leave it out, or set data.cache_gb=0 to decode them anew."
        )
    if config.permute_pixels:
        whole = whole.permuted()
        if config.img_size is not None and config.size != whole.size:
            stored, asked = ("x".join(map(str, known(size))) for size in (whole.size, config.size))
            raise UserError(
                f"data.permute_pixels=true needs images that are stored at the model's size, and those of {whole.name} "
                f"({whole.split}) are {stored}, not {asked}."
            )
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


def _load(config: recipes.Data, role: str, classes: list[str] | None, apart: bool) -> ImageSet:
    if config.name == "digits":
        return _digits(role, config.in_chans or 1)
    found = rows_of(config, role, apart)
    rows, split = found.rows, found.split
    path = place(config.name)
    name = path.resolve().name if path.exists() else config.name
    if config.config:
        name = f"{name}-{config.config}"
    title = f"{name}/{split}"
    labels, classes = labels_of(found, classes, title)

    read = decoding.Reader(rows, found.image, config.layout, config.pages, found.folders)
    look = decoding.probe(read, len(rows), config.skip_broken, title)
    channels, size = config.in_chans or look.channels, look.size
    content = _identity(read, found, channels, config)
    where = path.resolve() if path.exists() else config.name  # two folders may hold files of equal names and times
    in_cache = size is not None and len(rows) * channels * math.prod(size) <= config.cache_gb * 1e9
    span, limits = None, None if config.range is None else pair(config.range)
    if limits and not look.deep and role == "train":
        say_once(f"data.range is not used: the inspected images of {title} have 8 bits.")
    if look.deep and limits is None:
        span, limits = _range(read, look, len(rows) if in_cache else None, f"{where} {content}", title)
    rules = Rules(channels, limits, config.background)
    decode = functools.partial(decoding.decode, read, rules)
    images, kept, broken, seen, clipped = None, None, [], look.seen, None
    if in_cache or config.skip_broken:
        shape = (channels, *size) if size is not None and in_cache else None
        stored = decoding.cached(
            f"{where} {content} {rules} {shape} {config.skip_broken}",
            functools.partial(decoding.decode_all, read, rules, len(rows), shape, config.skip_broken),
            f"{'Decoding' if in_cache else 'Looking for broken images among'} {len(rows):,} images of {title}, once …",
            decoding.ROOM if config.skip_broken else f"{decoding.ROOM.rstrip('.')}, or set data.cache_gb=0.",
        )
        images, kept, broken = stored["images"], stored["kept"], stored["broken"]
        content, clipped = stored["digest"] or f"{content} {limits} {broken}", stored["clipped"]
        seen = Counter(dict(stored["seen"]))
        if broken:
            say_once(f"Left out {len(broken)} broken image(s) of {title}; the first: {broken[0]}")
        if in_cache and images is None:
            say_once(f"The images of {title} differ in size: workers decode them when they are needed.")
            size = None
        if stored["alike"]:
            raise decoding.alike(len(stored["images"]), title)
    if images is None:
        decoding.refuse_alike(decode, look.indices, title)
    draft = config.jpeg_draft and images is None
    if draft:
        content = f"{content} draft"
    if draft and role == "train" and not any(form in JPEG for form, *_ in look.seen):
        say_once(f"data.jpeg_draft is not used: the inspected images of {title} are no JPEGs.")
    if labels is not None and kept is not None:
        labels = labels[kept]
    if labels is not None and not bool((labels >= 0).any()):
        labels, classes = None, None
    count = len(rows) if kept is None else len(kept)
    numbers = found.numbers
    if kept is not None:
        numbers = kept.numpy() if numbers is None else numbers[kept.numpy()]
    mask_of = masks.reader(rows, found.folders)
    used = rules if look.deep else Rules(channels, None, config.background)
    entry = ledger.entry(title, found.ledger, seen, size, count, broken, labels, classes, used, span, clipped)
    ledger.tell(entry)
    return ImageSet(
        name=name,
        split=split,
        labels=labels,
        classes=classes,
        fingerprint=_fingerprint(content, labels),
        channels=channels,
        count=count,
        size=size,
        images=images,
        photo=functools.partial(decoding.photo, functools.partial(decoding.advising, decode), kept)
        if images is None
        else None,
        opened=functools.partial(decoding.photo, functools.partial(decoding.open_photo, read, rules), kept)
        if draft
        else None,
        flip=found.flip,
        masks=mask_of and functools.partial(decoding.photo, mask_of, kept),
        names=functools.partial(_names, functools.partial(decoding.names, rows, found.image, found.whole), kept),
        numbers=numbers,
        range=rules.range,
        ledger=entry,
    )


def _range(
    read: decoding.Reader, look: decoding.Look, count: int | None, identity: str, title: str
) -> tuple[dict, tuple[float, float]]:
    """(the values found, black and white) of a set deeper than 8 bits: by all `count` images or the inspected ones."""
    if len(look.deep) > 1:
        raise UserError(
            f"The images of {title} hold {' and '.join(look.deep)}: set data.range=[LOW, HIGH], the values of black "
            "and white in all of them."
        )
    indices = look.indices if count is None else list(range(count))
    span = decoding.cached(f"range {identity} {len(indices)}", functools.partial(decoding.span, read, indices))
    return span | dict(images=len(indices)), decoding.choose_range(look.deep[0], span["low"], span["high"])


def _names(names: Callable[[], list[str] | None], chosen: Tensor | None) -> list[str] | None:
    """Those of the chosen images, or all; None if there are none."""
    found = names()
    return found if found is None or chosen is None else [found[i] for i in chosen.tolist()]


def _digits(role: str, channels: int) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, report = train_test_split(np.arange(1797), test_size=360, stratify=bunch.target, random_state=0)
    chosen = np.sort(train if role == "train" else report)
    images = torch.from_numpy((bunch.images[chosen] * (255 / 16)).round().astype(np.uint8))[:, None]
    images = images.repeat(1, channels, 1, 1)
    labels = torch.from_numpy(bunch.target[chosen]).long()
    split, classes = "train" if role == "train" else "the fixed 360", [str(d) for d in range(10)]
    seen = Counter({("array", "1 x uint8", False, False): len(images)})
    entry = ledger.entry(
        f"digits/{split}", {}, seen, (8, 8), len(images), [], labels, classes, Rules(channels), None, None
    )
    return ImageSet(
        name="digits",
        split=split,
        labels=labels,
        classes=classes,
        fingerprint=_fingerprint(decoding.digest(images), labels),
        channels=channels,
        count=len(images),
        size=(8, 8),
        images=images,
        flip=False,
        ledger=entry,
    )


def _identity(read: decoding.Reader, found: Rows, channels: int, config: recipes.Data) -> str:
    """What identifies the images before they are decoded: file names, sizes and times, or the table's fingerprint and
    those of the files that it names; and how they will be decoded."""
    rows, image = read.rows, found.image
    if decoding.FILE in rows.column_names:
        columns = (rows[column][:] for column in (decoding.FILE, decoding.SIZE, decoding.TIME))
        files: list[object] = list(zip(*columns, strict=True))
    else:
        files = [rows._fingerprint, found.files, *read.files()]
    made = [decoding.LAW, channels, config.layout, config.pages, config.background, config.range]
    return hashlib.sha256(json.dumps([files, found.split, image, made]).encode()).hexdigest()


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
