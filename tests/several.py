"""Several processes of a script, as a launcher starts them, in children that share the imports."""

import os
from collections.abc import Callable
from pathlib import Path

import sklearn.datasets  # noqa: F401  # which the children would each import for seconds
import torch._dynamo  # noqa: F401
from conftest import CLOSE, join, start
from torch.distributed import TCPStore


class Several:
    """A script's main in `count` children, which find each other as torchrun's do. log: what all of them say."""

    def __init__(self, main: Callable[[], int], folder: Path, *arguments: str, count: int = 2, **environment: str):
        self.log = folder / "said-by-all.txt"
        self.log.unlink(missing_ok=True)
        # as in torchrun, whose own process holds the store
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = dict(
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(self.store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        before = dict(os.environ)
        self.processes = []
        CLOSE.append(self.close)
        try:
            for rank in range(count):
                os.environ.update(common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) | environment)
                self.processes.append(start(main, folder, self.log, *arguments))
        finally:
            os.environ.clear()
            os.environ.update(before)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Their exit codes, of those that end in time. `said` then has the tracebacks of the others."""
        join(self.processes, timeout)
        codes = [process.exitcode for process in self.processes]
        self.close()
        return codes

    def close(self) -> None:
        """End them, and the thread of their store."""
        for process in self.processes:
            process.kill()
        self.store = None

    @property
    def said(self) -> str:
        return self.log.read_text()
