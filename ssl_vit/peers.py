"""One message where a run of several processes fails: that of the process that failed first.

They find each other through the store that torchrun and `accelerate launch` keep, which outlives each of them. Tasks of
`srun python` have none, and are refused.
"""

import os
import shlex
import sys
import traceback
from datetime import timedelta

from ssl_vit.commands import current, launchable

REMEDY = "The system may have killed it for want of memory. The same command resumes from the last checkpoint."
LOST = f"error: another process of this run has ended, or cannot be reached, and none here has said why. {REMEDY}"
LOST_CODE = 76  # the exit code of a process that waited for it: sysexits.h's EX_PROTOCOL
LAUNCHER = "SSL_VIT_LAUNCHER"  # set for the processes that ssl_vit/launcher.py starts: it says which of them was killed
# what gloo and NCCL say where a process that they wait for has gone
SIGNS = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused"),
    *("NCCL communicator was aborted", "remote process exited", "ncclRemoteError"),
)


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def strangers() -> int:
    """Tasks that srun started without a launcher, each of which takes itself for the only one; or 0."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return tasks if tasks > 1 and "WORLD_SIZE" not in os.environ else 0


def introduction() -> str:
    """What to type instead of `srun python` with several tasks."""
    name, tasks = current(), strangers()
    script = shlex.join([*(launchable(name) if name else sys.argv[:1]), *sys.argv[1:]])
    nodes, cores = (int(os.environ.get(name, "1")) for name in ("SLURM_STEP_NUM_NODES", "SLURM_CPUS_PER_TASK"))
    cores *= tasks // nodes  # of one launcher
    each = f"--nproc_per_node {tasks // nodes} {script}"
    if nodes == 1:
        command = f"srun -n 1 -c {cores} torchrun --standalone {each}"
    else:
        command = (
            f"srun --ntasks-per-node=1 -c {cores} torchrun --nnodes {nodes} --rdzv_backend c10d "
            f"--rdzv_endpoint $(hostname):29500 --rdzv_id $SLURM_JOB_ID {each}"
        )
    where = "" if nodes == 1 else ", in a script for sbatch"
    return (
        f"srun started {tasks} tasks that do not know of each other. Start one launcher on each node{where} "
        f"(docs/scaling.md): {command}"
    )


class Lost(Exception):
    """Another process has gone."""


def lost(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    return said or isinstance(error, Lost)


def message(error: Exception) -> str:
    """What to print of a fault of ours, or of a process that waited for one that has gone."""
    if not lost(error):
        return "".join(traceback.format_exception(error))
    return "" if LAUNCHER in os.environ else f"{LOST} ({' '.join(str(error).split())[:200]})"


def failed_first() -> bool:
    """Whether no process of this run has asked before; also where there is no launcher's store to tell."""
    if strangers():
        return os.environ["SLURM_PROCID"] == "0"
    if not several() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import DistError, TCPStore

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"ssl_vit/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except DistError:  # the launcher has gone, and all of it with it
        return True
