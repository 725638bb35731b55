"""Several processes of a script, as a launcher starts them, in children that share the imports."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import sklearn.datasets  # noqa: F401  # which the children would each import for seconds
import torch._dynamo  # noqa: F401
from conftest import PATIENT, join, start
from torch.distributed import TCPStore


def hold(listener: socket.socket) -> int:
    """Keep a store at this socket until killed."""
    port = listener.getsockname()[1]
    store = TCPStore(  # noqa: F841  # which lives as long as its name
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    signal.pause()
    return 0


class Several:
    """A script's main in `count` children, which find each other as torchrun's do. log: what all of them say."""

    def __init__(self, main: Callable[[], int], folder: Path, *arguments: str, count: int = 2, **environment: str):
        self.log = folder / "said-by-all.txt"
        self.log.unlink(missing_ok=True)
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = listener.getsockname()[1]
        common = dict(
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        before = dict(os.environ)
        self.processes: list[multiprocessing.Process] = []
        # as in torchrun, a process of its own; with the store's thread in this one, forks hung, one launch in a hundred
        self.store = start(lambda: hold(listener), folder, self.log)
        listener.close()
        try:
            for rank in range(count):
                os.environ.update(common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) | environment)
                self.processes.append(start(main, folder, self.log, *arguments))
        finally:
            os.environ.clear()
            os.environ.update(before)

    def wait(self) -> list[int | None]:
        """Their exit codes, of those that end in time. `said` then has the tracebacks of the others."""
        join(self.processes, PATIENT)
        codes = [process.exitcode for process in self.processes]
        self.close()
        return codes

    def close(self) -> None:
        """End them, and their store."""
        for process in [*self.processes, self.store]:
            process.kill()

    @property
    def said(self) -> str:
        return self.log.read_text()
