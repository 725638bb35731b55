"""Cores and threads of this process, and the signals that ask it to stop."""

import ctypes
import os
import signal
import sys
from types import FrameType
from typing import Literal

import torch

import ssl_vit
from ssl_vit.errors import UserError

# what asks a process to stop: schedulers (Slurm, docker, systemd, timeout), Ctrl-C, a warning before time is up, and a
# terminal that is closed
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def heeded() -> list[int]:
    """Those of STOPPING that this process was not started to ignore, as `nohup` and a shell's `&` do."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


class StopSignal:
    """SIGTERM, Ctrl-C, SIGUSR1, SIGUSR2, SIGHUP, or the death of the launcher: the step is finished and saved, then the
    process ends with the shell's code of that signal (128 + its number)."""

    def __init__(self) -> None:
        self._asked: int | None = None
        # accelerate launch dies of SIGTERM without passing it on to its one child, and so does a killed torchrun
        launched = not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
        own, parent = ssl_vit.STARTED
        self._launcher = (parent if own == os.getpid() else os.getppid()) if launched else None

    def __enter__(self) -> "StopSignal":
        """From here on a signal waits for the step; before the first step there is nothing to save."""
        self._before = {number: signal.signal(number, self._ask) for number in heeded()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number

    @property
    def requested(self) -> bool:
        return self._asked is not None or (self._launcher is not None and os.getppid() != self._launcher)

    @property
    def code(self) -> int:
        """The exit code: that of the signal, or SIGTERM's where another process was asked or the launcher died."""
        return 128 + (self._asked or signal.SIGTERM)


def cores() -> int:
    """CPU cores for each process on this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


Precision = Literal["fp32", "tf32", "bf16"]


def precision(asked: Literal["auto"] | Precision, cuda: bool) -> Precision:
    """As asked; with "auto" bf16 on a GPU with units for it (compute capability 8.0 or more), else fp32.

    Raises UserError for tf32 without such a GPU.
    """
    units = cuda and torch.cuda.get_device_capability() >= (8, 0)
    if asked == "tf32" and not units:
        raise UserError("Precision tf32 needs an NVIDIA GPU of compute capability 8.0 or more: take fp32.")
    if asked == "auto":
        return "bf16" if units else "fp32"
    return asked


def set_products(precision: Precision) -> None:
    """From here on, a GPU rounds the factors of float32 products to TF32's ten bits for "tf32" alone; torch would do so
    in every convolution."""
    # by torch's older flags: its exporters and compiler read these, and fail where the newer ones were set
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def workers(asked: int | Literal["auto"]) -> int:
    """Decoding processes: as many as asked for, or with "auto" the cores, at most 16."""
    return min(cores(), 16) if asked == "auto" else asked


def prepare(threads: int | Literal["auto"]) -> None:
    """Prepare this process for computing: set the CPU threads of torch and faiss, as launchers would set one and the
    last bits of results depend on their number, and keep its memory."""
    import faiss

    count = cores() if threads == "auto" else threads
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    _keep_memory()


# the user's variable, glibc's number of the option (malloc.h), and the value: never to trim, and the most it allows
_MALLOC = (("MALLOC_TRIM_THRESHOLD_", -1, -1), ("MALLOC_MMAP_THRESHOLD_", -3, 32 * 2**20))


def _keep_memory() -> None:
    """Keep freed memory for the next tensors instead of giving it back to the kernel, which would clear each page of it
    anew in the next step (docs/performance.md). Only where the C library is glibc, and for tensors of up to 32 MB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for variable, option, value in _MALLOC:
        if mallopt is not None and variable not in os.environ:
            mallopt(option, value)
