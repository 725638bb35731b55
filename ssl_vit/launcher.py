"""`accelerate launch`, with its arguments, but without its stack where a process fails: that process has said why.

    python ssl_vit/launcher.py --num_processes 4 --multi_gpu ssl_vit/pretrain.py --recipe mae

Under `srun --ntasks-per-node=1` it takes the number of machines and its own from Slurm.

It passes a signal on and waits for its processes for two minutes, in which they finish the step and save; torch's own
launcher kills them after 30 seconds. Of a single process it waits for the end, whatever that takes. Its exit code is
theirs, or 128 plus the signal's number.
"""

import logging
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ssl_vit import peers, system

GRACE = "120"  # seconds


def pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the process that was started. Ctrl-C in a terminal has reached it already."""
    if number != signal.SIGINT or not sys.stdin.isatty():
        for child in psutil.Process().children():
            child.send_signal(number)


def main() -> int:
    logging.disable(logging.ERROR)  # of torchrun, here: not in the processes
    os.environ[peers.LAUNCHER] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE)
    arguments = launch_command_parser().parse_args()
    if int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1:  # one launcher on each node, started by srun
        arguments.num_machines = arguments.num_machines or int(os.environ["SLURM_STEP_NUM_NODES"])
        if arguments.machine_rank is None:
            arguments.machine_rank = int(os.environ["SLURM_NODEID"])
    arguments.quiet = False  # else the code of a single process is lost
    several = arguments.multi_gpu or any((n or 1) > 1 for n in (arguments.num_processes, arguments.num_machines))
    if several:  # torchrun passes on what it is told to, once its processes run, and without this neither USR1 nor USR2
        arguments.signals_to_handle = ",".join(
            signal.Signals(number).name for number in (*system.heeded(), signal.SIGQUIT)
        )
    else:
        for number in system.heeded():
            signal.signal(number, pass_on)
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as failed:  # of a single process
        return failed.returncode if failed.returncode > 0 else 128 - failed.returncode
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ChildFailedError as failed:
        told = {rank: each for rank, each in failed.failures.items() if each.exitcode != peers.LOST_CODE}
        process, failure = min((told or failed.failures).items(), key=lambda item: item[1].timestamp)
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"\nerror: process {process} was ended by {name}. {peers.REMEDY}", file=sys.stderr)
        elif not told:
            print(f"\n{peers.LOST}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    except (ConnectionError, DistNetworkError) as error:
        place = f"{arguments.main_process_ip or 'this machine'}:{arguments.main_process_port}"
        reason = " ".join(str(error).split())[:120]
        print(
            f"error: The launchers cannot meet at {place} ({reason}). Take another --main_process_port, the same on "
            "all machines, and as --main_process_ip the first machine's name.",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
