"""`accelerate launch`, with its arguments, but without its stack where a process fails: that process has said why.

python ssl_vit/launcher.py --num_processes 4 --multi_gpu ssl_vit/pretrain.py --recipe mae
"""

import logging
import os
import signal
import sys

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ssl_vit import peers


def main() -> int:
    logging.disable(logging.ERROR)  # of torchrun, here: not in the processes
    os.environ[peers.LAUNCHER] = "1"
    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as failed:
        process, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"\nerror: process {process} was ended by {name}. {peers.REMEDY}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
