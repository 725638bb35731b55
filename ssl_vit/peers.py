"""One message where a run of several processes fails: that of the process that failed first.

They find each other through the store that torchrun and `accelerate launch` keep, which outlives each of them.
"""

import os
import traceback
from datetime import timedelta

REMEDY = "The system may have killed it for want of memory. The same command resumes from the last checkpoint."
LOST = f"error: another process of this run has ended without a message. {REMEDY}"
LAUNCHER = "SSL_VIT_LAUNCHER"  # set for the processes that ssl_vit/launcher.py starts: it says which of them was killed
# what gloo and NCCL say where a process that they wait for has gone
SIGNS = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused"),
    *("NCCL communicator was aborted", "remote process exited", "ncclRemoteError"),
)


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def message(error: Exception) -> str:
    """What to print of a fault of ours, or of a process that waited for one that has gone."""
    if not lost(error):
        return "".join(traceback.format_exception(error))
    return "" if LAUNCHER in os.environ else LOST


def failed_first() -> bool:
    """Whether no process of this run has asked before; also where there is no launcher's store to tell."""
    if not several() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import DistError, TCPStore

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"ssl_vit/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except DistError:  # the launcher has gone, and all of it with it
        return True
