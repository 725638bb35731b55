"""All images of a set, split by split, for commands that use a model instead of judging it."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ssl_vit import data
from ssl_vit import recipe as recipes
from ssl_vit.data import ImageSet
from ssl_vit.errors import NothingHeldOut, UserError
from ssl_vit.views import Evaluation


@dataclass
class Images:
    """The splits, one after another. A global index counts through all of them."""

    splits: list[ImageSet]

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    @property
    def name(self) -> str:
        return self.splits[0].name

    @property
    def files(self) -> list[str]:
        """For each image its path under its split or in the table, or its number in the split if it has no path."""
        found: list[str] = []
        for part in self.splits:
            numbers = range(len(part)) if part.numbers is None else part.numbers
            names = part.names()
            found += map(str, numbers) if names is None else names
        return found

    @property
    def titles(self) -> list[str]:
        """The same for a reader: with the split, where there are several, and the word image before a number."""
        names = [f"image {name}" if name.isdecimal() else name for name in self.files]
        if len(set(self.split_names)) == 1:
            return names
        return [f"{split}: {name}" for split, name in zip(self.split_names, names, strict=True)]

    @property
    def split_names(self) -> list[str]:
        """For each image the name of its split; the two parts of one that was divided for reports are one."""
        return [part.partition(" (")[0] for part in self.parts]

    @property
    def parts(self) -> list[str]:
        """For each image the name of its split, or of the part of one that was divided for reports."""
        return [part.split for part in self.splits for _ in range(len(part))]

    @property
    def classes(self) -> list[str] | None:
        """The names of all splits' classes, those of the first in their order."""
        return list(dict.fromkeys(name for part in self.splits for name in part.classes or [])) or None

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (n,), in `classes`, −1 where an image has none; None if none has."""
        names = self.classes
        if names is None or all(part.labels is None for part in self.splits):
            return None
        parts = []
        for part in self.splits:  # where the first split has no labels, each of the others counts its own
            number = np.array([*(names.index(name) for name in part.classes or []), -1])
            parts.append(np.full(len(part), -1) if part.labels is None else number[part.labels.cpu().numpy()])
        return np.concatenate(parts)

    def views(self, view: Evaluation, chosen: list[int], device: torch.device) -> Tensor:
        """The evaluation views (B, C, H, W) in [0, 1] of images by their global indices, on the device."""
        found: dict[int, Tensor] = {}
        start = 0
        for part in self.splits:
            here = [i for i in dict.fromkeys(chosen) if start <= i < start + len(part)]
            if here:
                batches = data.evaluation_views(part, view, device, torch.tensor(here) - start)
                found |= dict(zip(here, torch.cat(list(batches)), strict=True))
            start += len(part)
        return torch.stack([found[i] for i in chosen])


def load(config: recipes.Data, channels: int, device: torch.device) -> Images:
    """Every split that the set has, whole and in one order, with as many channels as the backbone takes.

    Raises UserError as data.load does, for an empty folder and for a broken image.
    """
    config = dataclasses.replace(config, in_chans=channels, hold_out=False, subset=None)
    first = data.load(config, "train", apart=False)
    parts = [first]
    if first.range is not None:
        config = dataclasses.replace(config, range=list(first.range))
    try:
        parts.append(data.load(config, "report", first.classes))
    except NothingHeldOut:  # so few that all are in the first part
        pass
    except UserError:  # one split without labels, of which nothing is held out
        if first.labels is not None:
            raise
    seen = [part.split.partition(" (")[0] for part in parts]
    for name in first.ledger.get("found", {}).get("splits", {}):
        if name not in seen:  # as a training split beside another: nothing is held out of it
            split = dataclasses.replace(config, train_split=name, report_split=seen[0])
            parts.append(data.load(split, "train", first.classes, apart=False))
    return Images([part.to(device) for part in parts])
