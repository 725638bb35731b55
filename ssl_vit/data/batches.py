"""An image set → chunks of augmented views for training, and batches of unaugmented ones for evaluation."""

import atexit
import math
import signal
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ssl_vit import system, views
from ssl_vit.data.image_set import ImageSet
from ssl_vit.devices import upload
from ssl_vit.errors import UserError
from ssl_vit.randomness import Draw
from ssl_vit.settings import known

# Photos that a decoding process hands over at a time. All processes so work on one step, and what they hold in advance
# does not grow with the batch: as many whole batches of 4,096 photos of 224 px would be 20 GB of 16 processes.
PIECE = 64


@dataclass
class Chunk:
    """Rows of one step on one process. crops: of photos, in pieces, each uint8 (B, V, C, h, w) by view."""

    draw: Draw
    indices: Tensor
    crops: list[dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, start: int, stop: int) -> "Chunk":
        """The chunk's rows start:stop."""
        if (start, stop) == (0, len(self)):
            return self  # whose draw has its rows on the device already
        crops = self.crops and _rows(self.crops, start, stop)
        return Chunk(self.draw.for_rows(self.draw.rows[start:stop]), self.indices[start:stop], crops)

    def views(self, images: ImageSet, spec: views.ViewSpec) -> dict[str, Tensor]:
        """The augmented views, float32 in [0, 1], on the device."""
        device = self.draw.device
        if self.crops is None:
            return views.make(spec, known(images.images)[upload(self.indices, device)], self.draw)
        crops = {name: torch.cat([upload(piece[name], device) for piece in self.crops]) for name in self.crops[0]}
        return views.finish(spec, crops, self.draw)


def chunks(
    images: ImageSet,
    spec: views.ViewSpec,
    plan: Iterator[tuple[int, np.ndarray, np.ndarray]],
    seed: int,
    device: torch.device,
    workers: int,
) -> Iterator[Chunk]:
    """A chunk for every (step, rows, indices) of the plan; photos are decoded and cropped ahead by workers, a
    piece of a chunk at a time."""
    if images.images is not None:
        for step, rows, indices in plan:
            yield Chunk(Draw(seed, step, torch.from_numpy(rows), device), torch.from_numpy(indices))
        return
    dataset = _Crops(images.opened or known(images.photo), spec, seed)
    begun: deque[int] = deque()  # the pieces of each chunk that has been handed out to the workers

    def pieces() -> Iterator[list[tuple[int, int, int]]]:
        for step, rows, indices in plan:
            begun.append(math.ceil(len(rows) / PIECE))
            items = [(step, int(row), int(index)) for row, index in zip(rows, indices, strict=True)]
            yield from (items[at : at + PIECE] for at in range(0, len(items), PIECE))

    loader: DataLoader[object] = DataLoader(
        dataset, batch_sampler=pieces(), num_workers=workers, pin_memory=device.type == "cuda", collate_fn=_collate
    )
    made = _batches(loader)
    for piece in made:
        steps, places, chosen, crops = zip(piece, *islice(made, begun.popleft() - 1), strict=True)
        yield Chunk(Draw(seed, int(steps[0][0]), torch.cat(places), device), torch.cat(chosen), list(crops))


def steps_ahead(images: int, workers: int) -> int:
    """Steps of so many images on this process that workers may have prepared: a DataLoader has two pieces of each."""
    return math.ceil(2 * workers / math.ceil(images / PIECE))


def evaluation_views(
    images: ImageSet,
    view: views.Evaluation,
    device: torch.device,
    indices: Tensor | None = None,
    batch: int = 256,
) -> Iterator[Tensor]:
    """Batches of unaugmented views, float32 (B, C, H, W) in [0, 1], of these images (default: all, in order)."""
    indices = torch.arange(len(images)) if indices is None else indices.cpu()
    if images.images is not None:
        for part in indices.split(batch):
            yield view(images.images[part.to(images.images.device)].to(device))
        return
    dataset = _Whole(images.opened or known(images.photo), view)
    workers = min(system.cores(), 16) if len(indices) > batch else 0
    loader: DataLoader[object] = DataLoader(
        dataset,
        batch_size=batch,
        sampler=indices.tolist(),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=_collate,
    )
    for part in _batches(loader):
        yield upload(part, device).float().div_(255)


Cropped = tuple[int, int, int, dict[str, Tensor]] | UserError  # step, row, index, crops by view


class _Crops(Dataset[object]):
    """Decodes photos and crops all their views from the originals. An item is (step, row, index)."""

    def __init__(self, photo: Callable[[int], Tensor | views.Photo], spec: views.ViewSpec, seed: int):
        self.photo, self.spec, self.seed = photo, spec, seed

    def __getitems__(self, items: list[tuple[int, int, int]]) -> list[Cropped]:
        """Items of one step."""
        steps, rows, _ = zip(*items, strict=True)
        crop = views.crop_photos(self.spec, Draw(self.seed, steps[0], torch.tensor(rows)))
        found: list[Cropped] = []
        for at, item in enumerate(items):
            try:
                found.append((*item, crop(at, self.photo(item[2]))))
            except UserError as error:
                found.append(error)
        return found


class _Whole(Dataset[object]):
    """Decodes one photo and makes its evaluation view, uint8 (C, H, W)."""

    def __init__(self, photo: Callable[[int], Tensor | views.Photo], view: views.Evaluation):
        self.photo, self.view = photo, view

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return views.whole_photo(self.view, self.photo(index))
        except UserError as error:
            return error


def _rows(pieces: list[dict[str, Tensor]], start: int, stop: int) -> list[dict[str, Tensor]]:
    """Rows start:stop of all pieces together."""
    found, at = [], 0
    for piece in pieces:
        first, end = max(start - at, 0), stop - at
        count = len(next(iter(piece.values())))
        if first < min(end, count):
            found.append({name: crops[first:end] for name, crops in piece.items()})
        at += count
    return found


def _collate(items: list):
    """The items stacked, or the first error among them: raised in a worker, it would arrive wrapped in a traceback."""
    return next((item for item in items if isinstance(item, UserError)), None) or default_collate(items)


def _start(loader: DataLoader) -> Iterator:
    """The loader's iterator, whose worker processes ignore the signals that ask to stop.

    Such a signal often goes to the whole process group (timeout, docker stop, systemd, Slurm), and the training loop
    needs the workers to end its step. They inherit the blocked signals, and end when the loop does. A worker that dies
    raises where a batch is awaited, within seconds: torch's SIGCHLD handler would raise anywhere, even inside an
    optimizer step.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, system.STOPPING)
    ended = signal.getsignal(signal.SIGCHLD)
    try:
        batches = iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, ended)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _running.add(batches)
    return batches


_running: weakref.WeakSet[Iterator] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    """At exit Python would send the remaining workers SIGTERM, which they ignore, and wait for them."""
    for batches in _running:
        _kill(getattr(batches, "_workers", []))


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _batches(loader: DataLoader) -> Iterator:
    """The loader's batches. Raises the UserError of a worker, and one for a worker that the system killed."""
    batches = _start(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, EOFError, OSError) as error:  # the latter two if it dies while it hands over a batch
        workers = getattr(batches, "_workers", [])
        dead = wait([worker.sentinel for worker in workers], timeout=1)
        if not dead and "DataLoader worker (pid" not in str(error):
            raise
        _kill(workers)  # they may wait for ever for a lock that the dead one held
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"A decoding process died ({reason}): if memory or /dev/shm is short, lower runtime.num_workers."
        ) from None
