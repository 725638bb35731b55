"""The ledger of a set's files: what was found, used and left out, and why. Every file is counted."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor

from ssl_vit.data.decoding import Kind
from ssl_vit.data.folders import counts
from ssl_vit.data.pixels import Rules
from ssl_vit.errors import say_once


def entry(
    title: str,
    found: dict,
    seen: Counter[Kind],
    size: tuple[int, int] | None,
    used: int,
    broken: list[str],
    labels: Tensor | None,
    classes: list[str] | None,
    rules: Rules,
    span: dict | None,
    clipped: tuple[int, int] | None,
) -> dict:
    """The ledger of one split, in plain values, for images.json.

    seen: how many of the looked-at images have (form, mode, alpha, turned); span: the values found in deep images;
    clipped: (images, values) outside of the range, where all images were decoded.
    """
    looked = sum(seen.values())
    return dict(
        title=title,
        broken=broken,
        found=found,
        looked_at=looked,
        formats=_count(seen, lambda form, mode, alpha, turned: form),
        modes=_count(seen, lambda form, mode, alpha, turned: mode),
        turned_upright=sum(n for (_, _, _, turned), n in seen.items() if turned),
        with_alpha=sum(n for (_, _, alpha, _), n in seen.items() if alpha),
        size=None if size is None else list(size),
        channels=rules.channels,
        background=rules.background,
        range=None if rules.range is None else list(rules.range),
        values_found=span,
        clipped=None if clipped is None else dict(images=clipped[0], values=clipped[1]),
        **counted(used, labels, classes),
    )


def part(entry: dict, used: int, labels: Tensor | None, classes: list[str] | None) -> dict:
    """The ledger of so many of a split's images: of a subset, without a held-out part, or of the labelled ones."""
    if not entry:  # of no files
        return entry
    of_split = entry.get("used_of_split", entry["used"])
    return entry | counted(used, labels, classes) | dict(used_of_split=of_split)


def counted(used: int, labels: Tensor | None, classes: list[str] | None) -> dict:
    """How many images are used, of each class and without a label."""
    per_class = None
    if labels is not None and classes is not None:
        numbers = labels[labels >= 0].bincount(minlength=len(classes)).tolist()
        per_class = dict(zip(classes, numbers, strict=True))
    without = used if labels is None else int((labels < 0).sum())
    return dict(used=used, labels_per_class=per_class, without_label=without)


def tell(entry: dict) -> None:
    """Print the ledger as a short paragraph, once."""
    used, looked, found = entry["used"], entry["looked_at"], entry["found"]
    size = entry["size"]
    sides = "of several sizes" if size is None else f"of {size[0]}x{size[1]}"
    inspected = "" if looked >= used else f" ({looked:,} inspected)"
    images = "image" if used == 1 else "images"
    kinds = f"{counts(entry['formats'])}; {counts(entry['modes'])}{inspected}"
    words = [f"{entry['title']}: {used:,} {images} {sides}, {kinds}"]
    if entry["turned_upright"]:
        words.append(f"{entry['turned_upright']:,} turned upright by EXIF")
    if entry["with_alpha"]:
        kept = entry["channels"] in (2, 4)
        ground = "alpha kept as a channel" if kept else f"alpha laid on {entry['background']} (data.background)"
        words.append(f"{entry['with_alpha']:,} with {ground}")
    if entry["range"] is not None:
        words.append(_range(entry))
    per_class = entry["labels_per_class"]
    if per_class is None:
        words.append("no labels")
    else:
        sizes = [n for n in per_class.values() if n]
        kinds = f"{len(sizes):,} {'class' if len(sizes) == 1 else 'classes'}"
        words.append(f"{kinds} of {_between(min(sizes), max(sizes))} images")
        if entry["without_label"]:
            words.append(f"{entry['without_label']:,} without a label, for tasks that need none")
    text = "; ".join(words) + "."
    if found.get("other_files"):
        text += f" Other files: {counts(found['other_files'])}."
    if found.get("image_files_beside"):
        text += (
            f" Of {found['image_files_beside']:,} image files beside the tables, only those that a row names are read."
        )
    say_once(text)


def _range(entry: dict) -> str:
    low, high = entry["range"]
    text = f"{low:g} is black and {high:g} white (data.range)"
    if entry["values_found"]:
        span = entry["values_found"]
        text += f", since the values of {span['images']:,} images lie from {span['low']:g} to {span['high']:g}"
    if entry["clipped"] and entry["clipped"]["values"]:
        text += f"; {entry['clipped']['values']:,} values in {entry['clipped']['images']:,} images lie outside"
    return text


def _between(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _count(seen: Counter[Kind], key: Callable[..., str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for kind, n in seen.items():
        found[key(*kind)] += n
    return dict(found)
