"""The page of eval/embed.py: what a backbone's features say about images, without labels."""

from collections import Counter

import numpy as np
import torch
from torch.nn.functional import interpolate

from eval.measure import features
from eval.measure.embedding import Findings
from eval.measure.everything import Images
from eval.measure.pictures import components
from eval.page import plots, thumbnails
from eval.page.document import Block, Cell, Figure, Heading, Items, Table, Text, Thumbnails
from ssl_vit.errors import plural
from ssl_vit.pictures import spread
from ssl_vit.views import Evaluation

QUERIES, PAIRS, STRANGE, CENTRAL, PATCHES = 6, 12, 12, 6, 6  # what is shown of each


def blocks(
    source: features.Source, images: Images, found: Findings, space: str, duplicates: float, file: str
) -> list[Block]:
    """The page, from top to bottom. space: the features compared; duplicates: the least similarity of a pair."""
    device = next(source.network.parameters()).device
    view = source.network.evaluation_view
    small = Evaluation((thumbnails.SIZE,) * 2, crop_mode="squash" if view.crop_mode == "squash" else "center")
    show = _Shown(images, small, device)
    kind = "class token" if space == "cls" else "mean of the patches"
    pairs = found.duplicates(duplicates)
    told = [
        ("Backbone", source.name),
        ("Images", f"{len(images):,}: {_counted(images.split_names)}"),
        ("Features", f"{kind}, centred, compared by their cosine; all are in {file} beside this page"),
    ]
    count = f"{'at least ' if found.has_more(duplicates) else ''}{plural(len(pairs), 'pair')}"
    lead = (
        f"{len(images):,} images in {found.group.max() + 1} groups; {count} with a similarity of {duplicates:g} or "
        f"more; the strangest image is {show.name(int(found.outlier.argmax()))}."
    )
    made: list[Block] = [Text(lead, "lead"), Items(told)]
    made += [Heading("Map"), *_map(images, found)]
    made += [Heading("Groups"), *_groups(images, found, show)]
    made += [Heading("Nearest neighbours"), *_neighbours(found, show)]
    made += [Heading("Near-duplicates"), *_duplicates(pairs, duplicates, found, show)]
    made += [Heading("Outliers"), *_outliers(found, show)]
    return made + [Heading("What the patches see"), *_patches(source, images, show)]


class _Shown:
    """Thumbnails of images by index, with captions."""

    def __init__(self, images: Images, view: Evaluation, device: torch.device):
        self.images, self.view, self.device = images, view, device
        self.titles, self.labels, self.classes = images.titles, images.labels, images.classes

    def name(self, i: int) -> str:
        return self.titles[i]

    def __call__(self, chosen: list[int], words: list[str] | None = None) -> list[tuple[np.ndarray | None, str]]:
        pictures = thumbnails.pixels(self.images.views(self.view, chosen, self.device))
        captions = [
            ", ".join(filter(None, (self.name(i), (words or [""] * len(chosen))[n]))) for n, i in enumerate(chosen)
        ]
        return list(zip(pictures, captions, strict=True))


def _counted(names: list[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in Counter(names).items())


def _map(images: Images, found: Findings) -> list[Block]:
    titles = images.titles
    points = [
        (float(x), float(y), int(found.group[i]), f"{titles[i]}, group {found.group[i] + 1}")
        for i, (x, y) in zip(found.mapped, found.places, strict=True)
    ]
    some = "" if len(points) == len(images) else f" Of {len(images):,} images {len(points):,} are drawn, at random."
    svg = plots.scatter(points, "Map", f"t-SNE of {len(points):,} images; numbers: groups")
    words = "Images that are alike lie close together; distances between far groups mean little. A dot tells its file."
    return [Figure([("map", svg)], words + some)]


def _groups(images: Images, found: Findings, show: _Shown) -> list[Block]:
    made: list[Block] = [Text("k-means of the features, the largest group first, with its most central images.")]
    lines = []
    for group in range(found.group.max() + 1):
        members = np.flatnonzero(found.group == group)
        central = members[np.argsort(-found.to_centre[members], kind="stable")]
        cells = [Cell(f"{len(members):,}"), Cell(f"{found.to_centre[members].mean():.2f}")]
        if show.labels is not None and show.classes is not None:
            known = show.labels[members][show.labels[members] >= 0]
            label, count = Counter(known.tolist()).most_common(1)[0] if len(known) else (None, 0)
            cells.append(Cell("–" if label is None else show.classes[label], f"{count:,} of {len(known):,}"))
        lines.append((Cell(f"Group {group + 1}"), cells))
        chosen = central[:CENTRAL].tolist()
        made.append(Thumbnails(show(chosen), f"Group {group + 1}, {len(members):,} images: the most central."))
    head = ["images", "similarity to the centre"] + ([] if show.labels is None else ["most frequent label"])
    caption = "The groups; a low similarity says that a group is loose."
    return [made[0], Table([("", head)], [("", lines)], caption), *made[1:]]


def _neighbours(found: Findings, show: _Shown) -> list[Block]:
    chosen = spread(len(found.group), None if show.labels is None else torch.from_numpy(show.labels), QUERIES).tolist()
    made: list[Block] = [Text("Images spread over the set, each with the others most alike and their similarity.")]
    for i in chosen:
        near = found.nearest[i].tolist()
        words = ["the image", *(f"{s:.2f}" for s in found.similarity[i])]
        made.append(Thumbnails(show([i, *near], words), f"{show.name(i)} and its nearest neighbours."))
    return made


def _duplicates(pairs: list[tuple[int, int, float]], least: float, found: Findings, show: _Shown) -> list[Block]:
    if not pairs:
        closest = float(found.similarity.max())
        return [Text(f"No two images have a similarity of {least:g} or more; the closest pair has {closest:.2f}.")]
    at_least = "At least " if found.has_more(least) else ""
    words = (
        f"{at_least}{len(pairs):,} pair{'s have' if len(pairs) > 1 else ' has'} a similarity of {least:g} or more. "
        "Look before you split the images. A backbone that was trained little finds many images alike: raise "
        "--duplicates then."
    )
    made: list[Block] = [Text(words)]
    for i, j, s in pairs[:PAIRS]:
        made.append(Thumbnails(show([i, j]), f"Similarity {s:.3f}."))
    return made


def _outliers(found: Findings, show: _Shown) -> list[Block]:
    strange = np.argsort(-found.outlier, kind="stable")[:STRANGE].tolist()
    words = [f"{found.outlier[i]:.2f}" for i in strange]
    caption = "1 minus the mean similarity to the nearest images: broken, mislabelled or rare ones come first."
    return [Thumbnails(show(strange, words), caption)]


@torch.inference_mode()
def _patches(source: features.Source, images: Images, show: _Shown) -> list[Block]:
    chosen = spread(len(images), None if show.labels is None else torch.from_numpy(show.labels), PATCHES).tolist()
    views = images.views(source.network.evaluation_view, chosen, show.device)
    [(_, patches)] = source.features(views)
    colours = interpolate(components(patches.float().cpu()).permute(0, 3, 1, 2), views.shape[-2:], mode="nearest")
    originals, drawn = thumbnails.pixels(views), thumbnails.pixels(colours)
    pictures: list[tuple[np.ndarray | None, str]] = []
    for i, original, colour in zip(chosen, originals, drawn, strict=True):
        pictures += [(original, show.name(i)), (colour, "its patches")]
    caption = (
        "The first three principal components of the patch features of these images as red, green and blue: patches of "
        "one colour are alike to the backbone."
    )
    return [Thumbnails(pictures, caption)]
