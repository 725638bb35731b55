"""What the machine gives this process, and asks of it."""

import os
import signal

# what asks a process to stop: schedulers (Slurm, docker, systemd, timeout), Ctrl-C, a warning before time is up, and a
# terminal that is closed
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def heeded() -> list[int]:
    """Those of STOPPING that this process was not started to ignore, as `nohup` and a shell's `&` do."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


def cores() -> int:
    """CPU cores for each process of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
