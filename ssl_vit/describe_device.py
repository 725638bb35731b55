"""What there is to compute on, for launch.sh: how many processes, and the device in words; a warning goes to stderr."""

import collections
import os
import subprocess
import sys
import warnings

import torch


def main() -> None:
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        names = collections.Counter(torch.cuda.get_device_name(i) for i in range(gpus))
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        listed = ", ".join(f"{n} × {name}" if n > 1 else name for name, n in names.items())
        print(f"{gpus}\nDevice: {listed} ({memory:.0f} GiB{' each' if gpus > 1 else ''})")
    elif torch.backends.mps.is_available():
        print("1\nDevice: Apple GPU (MPS)")
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        print(f"1\nDevice: CPU ({cores} core{'s' if cores > 1 else ''})")
        if gpu := idle_gpu():
            said = f" ({str(complaints[0].message).splitlines()[0]})" if complaints else ""
            print(f"Warning: there is a GPU, {gpu}, but the CPU is used: {why_idle(said)}", file=sys.stderr)


def idle_gpu() -> str | None:
    """The first GPU that nvidia-smi lists."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if listed.returncode or "GPU 0" not in listed.stdout:
        return None
    return listed.stdout.splitlines()[0].split(": ", 1)[1].split(" (UUID")[0]


def why_idle(said: str) -> str:
    """Why torch does not use it, with the remedy. said: torch's own warning."""
    if "CUDA_VISIBLE_DEVICES" in os.environ and os.environ["CUDA_VISIBLE_DEVICES"].strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides it. To use it: unset CUDA_VISIBLE_DEVICES."
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA. To use it: install a torch with CUDA and its "
            "torchvision, or leave this environment, and .venv is used."
        )
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it{said}. To use it: update the driver to "
        "one for that CUDA ('nvidia-smi' names the newest it can run), or activate an environment of your own with a "
        "torch for the driver you have."
    )


if __name__ == "__main__":
    main()
