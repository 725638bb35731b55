"""What the machine gives this process, and asks of it."""

import os
import signal

# what asks a process to stop: schedulers (Slurm, docker, systemd, timeout), Ctrl-C, a warning before time is up
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def cores() -> int:
    """CPU cores for each process of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
