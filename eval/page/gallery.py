"""The pictures that runs saved, side by side."""

from pathlib import Path

from eval.compare.runs import Group, foremost
from eval.page.document import (
    Block,
    Gallery,
    Heading,
    Text,
)

PICTURES = dict(
    reconstruction="original, input to the encoder, and reconstruction",
    attention="attention of the class token",
    neighbours="nearest training images of test images",
    patches="PCA of patch features as RGB",
    masks="attention of the head that fits a class of the image best, as a mask",
    segmentation="classes of pixels, as probes of the patch features predict them",
)


def gallery(groups: list[Group]) -> list[Block]:
    """The pictures of each recipe's first seed, grouped by kind; of a study's arm, those with the largest budget."""
    found = {group: sorted((group.runs[0].folder / "pictures").glob("*.png")) for group in groups}
    kinds: dict[str, list[tuple[Path, str]]] = {}
    for group in sorted(foremost(group for group in groups if found[group]), key=lambda g: (g.control, g.label)):
        for file in found[group]:
            kind, task = _shows(file.stem)
            kinds.setdefault(kind, []).append((file, f"{group.label}{task}: {kind}"))
    blocks: list[Block] = [Heading("Pictures"), Text("From the first seed of each recipe.")] if kinds else []
    for kind, pictures in sorted(kinds.items()):
        blocks += [Heading(kind[0].upper() + kind[1:], 3), Gallery(pictures)]
    return blocks


def _shows(stem: str) -> tuple[str, str]:
    """(what a picture of this name shows, its task if there are several)."""
    data, _, kind = stem.rpartition("-")
    if data and kind in PICTURES:
        return f"{data}: {PICTURES[kind]}", ""
    task, _, kind = stem.rpartition("_")
    return PICTURES.get(kind, stem), f" ({task})" if task and kind in PICTURES else ""
