"""Every random draw has an address: (seed, step, stream, row, element).

A draw is a pure function of its address, so nothing has to be saved to resume a run, and cutting a batch into
micro-batches or over processes leaves every crop, mask and noise value as it was. The function is Philox4x32-10
(`philox`): the same integers on every device.
"""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from ssl_vit import philox
from ssl_vit.devices import upload


class Draw:
    """The random numbers of some rows of one step. rows: int64 (B,), places in the global batch, on the CPU.

    Numbers come on `device`; one and the same address gives the same bits on every device. Where the host must
    know them to decide what to compute, ask for them on the CPU instead: that waits for nothing.
    """

    def __init__(self, seed: int, step: int, rows: Tensor, device: torch.device | str = "cpu", prefix: str = ""):
        self.seed, self.step, self.rows, self.device, self.prefix = seed, step, rows, torch.device(device), prefix
        self._rows = {torch.device("cpu"): rows}

    def fold_in(self, name: str) -> "Draw":
        """The same rows with streams of their own: draws under different names are independent."""
        return Draw(self.seed, self.step, self.rows, self.device, f"{self.prefix}{name}/")

    def for_rows(self, rows: Tensor) -> "Draw":
        """The same streams for other rows."""
        return Draw(self.seed, self.step, rows, self.device, self.prefix)

    def uniform(self, stream: str, *shape: int, device: torch.device | str | None = None) -> Tensor:
        """Independent float32 values in [0, 1), of shape (B, *shape); 24 random bits each."""
        return philox.uniform(*self._address(stream, shape, device)).reshape(len(self.rows), *shape)

    def normal(self, stream: str, *shape: int, device: torch.device | str | None = None) -> Tensor:
        """Independent standard normal float32 values (Box-Muller), of shape (B, *shape)."""
        u = self.uniform(stream, 2, *shape, device=device)
        radius = (-2.0 * torch.log(1.0 - u[:, 0])).sqrt()
        return radius * torch.cos(2 * math.pi * u[:, 1])

    def bits(self, stream: str, *shape: int, device: torch.device | str | None = None) -> Tensor:
        """Independent 32-bit words as int64, of shape (B, *shape)."""
        return philox.words(*self._address(stream, shape, device)).reshape(len(self.rows), *shape)

    def _address(
        self, stream: str, shape: tuple[int, ...], device: torch.device | str | None
    ) -> tuple[Tensor, int, int, int, int]:
        where = torch.device(device or self.device)
        if where not in self._rows:
            self._rows[where] = upload(self.rows, where)
        return self._rows[where], math.prod(shape), self.step, zlib.crc32((self.prefix + stream).encode()), self.seed


def permutation(seed: int, epoch: int, n: int, stream: str = "order") -> np.ndarray:
    """A random order of n things, int64 (n,); in the default stream that in which epoch `epoch` visits n images."""
    high, low = Draw(seed, epoch, torch.arange(n)).bits(stream, 2).unbind(1)
    return np.argsort((high.numpy() << 31) ^ low.numpy(), kind="stable")


class Order:
    """Which image is row r of step s: element t mod n of the permutation of epoch t div n, with t = s·B + r.

    No image is dropped and none repeated within an epoch; the batch may be larger than the set.

    repeats: how many rows of a step show the same image, each in another view (Hoffer et al. 2020, arXiv 1901.09335;
    DeiT's RASampler). A step then takes D = ceil(B / repeats) images from the order, its row r the image s·D + r mod D:
    neighbours, which mixup pairs, are different images.
    """

    def __init__(self, seed: int, n: int, batch_size: int, repeats: int = 1):
        self.seed, self.n, self.distinct = seed, n, -(-batch_size // repeats)
        self._epochs: dict[int, np.ndarray] = {}

    def indices(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Image indices, int64 (len(rows),), of these rows of the global batch of this step."""
        epochs, places = np.divmod(step * self.distinct + rows % self.distinct, self.n)
        chosen = np.empty(len(rows), dtype=np.int64)
        for epoch in np.unique(epochs):
            if epoch not in self._epochs:
                self._epochs = {e: p for e, p in self._epochs.items() if e >= epoch - 1}
                self._epochs[epoch] = permutation(self.seed, int(epoch), self.n)
            here = epochs == epoch
            chosen[here] = self._epochs[epoch][places[here]]
        return chosen
