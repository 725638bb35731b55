"""launch.sh, with stubs in place of the installation, the training and the k-NN: which commands run, in which order."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import PATIENT
from test_loop import until

ROOT = Path(__file__).resolve().parent.parent
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m pip install"*) echo "pip ${{*:4}}" >>"$LOG"
    while [ -n "${{PIP_WAITS:-}}" ] && [ ! -e "$PIP_WAITS" ]; do sleep 0.05; done
    exit "${{PIP_EXIT:-0}}" ;;
  *--print-output*)
    [ "${{REFUSE:-0}}" = 0 ] || exit "$REFUSE"
    case "$*" in *train.steps=0*) echo runs/random ;; *) echo runs/trained ;; esac ;;
  "-m pip --version" | *"import torchvision"*) ;;
  "-m pytest"*) echo "pytest ${{*:3}} threads=${{OMP_NUM_THREADS:-}}" >>"$LOG" ;;
  *knn.py* | *study.py* | *pretrain.py*--plan*) echo "python $*" >>"$LOG"; echo TABLE; exit "${{STUDY_EXIT:-0}}" ;;
  *launcher.py* | *pretrain.py*)
    echo "python $*" >>"$LOG"
    [ -z "${{TRAINING:-}}" ] || exec "$TRAINING"
    exit "${{TRAIN_EXIT:-0}}" ;;
  *) PYTHONPATH="$MODULES" exec "{sys.executable}" -S "$@" ;;  # -S: without the packages installed here
esac
"""
ACCELERATE = """#!/usr/bin/env bash
echo "accelerate $*" >>"$LOG"
exit "${TRAIN_EXIT:-0}"
"""
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0")${*:+ $*}" >>"$LOG"
[ "${FAILS:-}" != "$(basename "$0")" ]
"""
# As much of torch as the line about the device asks for.
TORCH = """
import types
__version__ = "2.15.0"
cuda = types.SimpleNamespace(is_available=lambda: False)
version = types.SimpleNamespace(cuda="13.2")
backends = types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: False))
"""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Project:
    """A copy of the project without its code, beside an active environment made of stubs."""

    def __init__(self, folder):
        self.root = folder / "the project"  # a blank, as in many a home folder
        self.environment, self.log = folder / "environment", folder / "log"
        self.root.mkdir()
        for name in ("launch.sh", "pyproject.toml", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "ssl_vit").mkdir()
        shutil.copy(ROOT / "ssl_vit/describe_device.py", self.root / "ssl_vit")
        for name in ("mae", "dino", "imagenet/mae"):
            script(self.root / f"recipes/{name}.yaml", "")
        script(self.environment / "bin/python", PYTHON)
        script(self.environment / "bin/accelerate", ACCELERATE)
        for tool in ("ruff", "codespell", "mypy"):
            script(self.environment / "bin" / tool, TOOL)
        script(folder / "modules/torch.py", TORCH)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CONDA", "OMP", "CUDA", "PYTEST", "PYTHON"))}
        self.env = clean | {"VIRTUAL_ENV": str(self.environment), "LOG": str(self.log), "HF_HOME": str(folder / "hf"),
                            "MODULES": str(folder / "modules")}  # fmt: skip

    def launch(self, *args, cwd=None, **env):
        """The finished process, and the commands it ran."""
        self.log.write_text("")
        command = ["bash", str(self.root / "launch.sh"), *args]
        options = {"cwd": cwd or self.root, "env": self.env | env, "timeout": 60}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        return done, self.log.read_text().splitlines()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["help"], ["dino", "--help"], ["compare", "--help"]])
def test_help_explains_and_sets_nothing_up(project, args):
    done, ran = project.launch(*args, VIRTUAL_ENV="")
    assert done.returncode == 0 and not done.stderr and not ran
    for word in ("./launch.sh [RECIPE]", "./launch.sh test", "--data", "dino", "imagenet/mae", "PYTHON", ".venv"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not (project.root / ".venv").exists()


def test_an_unknown_recipe_is_refused_before_anything_is_installed(project):
    done, ran = project.launch("dinno", VIRTUAL_ENV="")
    assert done.returncode == 2 and not ran and not (project.root / ".venv").exists()
    assert len(done.stderr.splitlines()) == 1
    assert "'dinno'" in done.stderr and "nearest name is 'dino'" in done.stderr and "mae" in done.stderr


def test_a_run_is_training_then_its_control_then_knn(project):
    done, ran = project.launch()
    assert done.returncode == 0, done.stderr
    assert ran[0] == "pip -q -e ."  # lower bounds: no constraints in an environment of another's making
    assert ran[1:] == [
        "python ssl_vit/pretrain.py --recipe mae",
        "python ssl_vit/pretrain.py --recipe mae train.flops=null train.steps=0",
        "python eval/knn.py --backbone runs/trained runs/random pixels",
    ]
    setup, after = done.stdout.split("Device: CPU (", 1)
    assert "Installing" in setup and "pretrain.py" not in setup
    assert after.index("pretrain.py") < after.index("TABLE") < after.index("Next:")
    assert "NAME: dino mae,\n" in after  # not the long list of published ones


@pytest.mark.parametrize("words", [["--import", "my own.py"], ["--import=my own.py"]])
def test_all_commands_import_the_same(words, project):
    _, ran = project.launch("mae", *words, "train.steps=3")
    assert [" ".join(words) in line for line in ran[1:]] == [True, True, True] and "knn.py" in ran[3]


def test_the_control_has_none_of_a_recipe_s_own_weights(project):
    script(project.root / "own.yaml", "backbone:\n  # init_from: nothing\n  init_from: runs/before\n")
    script(project.root / "none.yaml", "backbone: {init_from: null}\n")
    _, ran = project.launch("own.yaml")
    assert ran[2].endswith("--recipe own.yaml train.flops=null train.steps=0 backbone.init_from=null")
    _, ran = project.launch("none.yaml")
    assert ran[1].endswith("--recipe none.yaml train.flops=null train.steps=0")


def test_what_only_prints_is_not_followed_by_a_run(project):
    done, ran = project.launch("dino", "--plan", "--gpu", "8xA100")
    assert done.returncode == 0 and ran[1:] == ["python ssl_vit/pretrain.py --recipe dino --plan --gpu 8xA100"]


@pytest.mark.parametrize(
    ("command", "plan"),
    [
        (["compare"], "compare"),
        (["study"], "denoising"),
        (["study", "--full"], "denoising-full"),
    ],
)
def test_a_plan_is_run_and_its_exit_code_passed_on(project, command, plan):
    done, ran = project.launch(*command, "--seeds", "3", "--data", "my photos", STUDY_EXIT="1")
    assert ran[1:] == [f"python eval/study.py {plan} --seeds 3 --data my photos"] and done.returncode == 1


def test_arguments_pass_through_and_the_control_stays_a_control(project):
    args = ["--data", "my photos", "--output", "here", "optim.lr=1", "train.flops=9", "--init-from", "x"]
    args += ["--output=there", "backbone.init_from=x"]
    done, ran = project.launch("dino", *args)
    assert done.returncode == 0, done.stderr
    assert ran[1].endswith(f"--recipe dino {' '.join(args)}")
    assert ran[2].endswith("--recipe dino --data my photos optim.lr=1 train.flops=9 train.flops=null train.steps=0")


def test_arguments_without_a_recipe_go_to_mae(project):
    for args in (["--data", "cifar10"], ["train.epochs=1"]):
        assert project.launch(*args)[1][-2].endswith(f"--recipe mae {' '.join(args)} train.flops=null train.steps=0")


def test_a_recipe_of_ones_own(project, tmp_path):
    script(tmp_path / "mine.yaml", "")
    done, ran = project.launch("mine.yaml", cwd=tmp_path)  # from elsewhere: paths mean what they mean there
    assert done.returncode == 0, done.stderr
    assert ran[1].endswith(f"{project.root}/ssl_vit/pretrain.py --recipe mine.yaml")


def test_a_configured_accelerate_is_respected(project, tmp_path):
    script(tmp_path / "hf/accelerate/default_config.yaml", "")
    assert project.launch("mae")[1][1] == "python ssl_vit/launcher.py -q ssl_vit/pretrain.py --recipe mae"


def test_a_failing_run_passes_its_exit_code_on_and_stops(project):
    done, ran = project.launch("mae", TRAIN_EXIT="7")
    assert done.returncode == 7 and len(ran) == 2 and "Next:" not in done.stdout
    done, ran = project.launch("mae", "no.such.key=1", REFUSE="2")  # refused before the launcher starts
    assert done.returncode == 2 and not ran


SAVING = f"""#!{sys.executable} -S
import os, signal, sys, time
def tell(text):
    with open(os.environ["LOG"], "a") as log:
        print(text, file=log, flush=True)
def save(number, frame):
    for other in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    time.sleep(0.5)
    tell("saved after " + signal.Signals(number).name)
    os._exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, save)
tell("training")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "whole"),
    [
        (signal.SIGTERM, False),  # as a supervisor or `docker stop` sends it
        (signal.SIGUSR1, False),
        (signal.SIGTERM, True),  # as Slurm does
        (signal.SIGINT, True),  # as a terminal does
    ],
)
def test_a_signal_reaches_the_training_and_its_end_is_waited_for(project, number, whole):
    script(project.root / "training", SAVING)
    command, env = ["bash", str(project.root / "launch.sh"), "mae"], project.env | {"TRAINING": "./training"}
    process = subprocess.Popen(command, cwd=project.root, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    until(lambda: project.log.exists() and "training" in project.log.read_text())
    (os.killpg if whole else os.kill)(process.pid, number)
    assert process.wait(PATIENT) == 128 + number
    assert project.log.read_text().splitlines()[2:] == ["training", f"saved after {number.name}"]


def test_one_set_up_at_a_time(project):
    options = dict(cwd=project.root, stdout=subprocess.PIPE, text=True)
    command = ["bash", str(project.root / "launch.sh"), "compare"]
    done = project.root / "set up"
    first = subprocess.Popen(command, env=project.env | {"PIP_WAITS": str(done)}, **options)
    until(lambda: project.log.exists() and "pip" in project.log.read_text())
    second = subprocess.Popen(command, env=project.env, **options)
    assert any("Waiting for another launch.sh" in line for line in second.stdout)
    done.touch()
    second.stdout.read()
    assert first.wait(PATIENT) == second.wait(PATIENT) == 0
    assert [line.split()[0] for line in project.log.read_text().splitlines()] == ["pip", "python", "python"]


def test_the_second_call_skips_the_set_up_until_something_changed(project):
    def sets_up(*args, **env):
        done, ran = project.launch(*args, **env)
        assert done.returncode == 0, done.stderr
        return any(line.startswith("pip ") for line in ran)

    assert sets_up("mae") and not sets_up("mae") and not sets_up("dino")
    assert sets_up("test") and not sets_up("test") and not sets_up("mae")  # the test extras include the rest
    assert (
        sets_up("check") and not sets_up("check") and not sets_up("test") and not sets_up("mae")
    )  # the dev extras too
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        with open(project.root / name, "a") as file:
            file.write("\n# changed\n")
        assert sets_up("mae") and not sets_up("mae")
    moved = project.root.parent / "moved"
    project.root = project.root.rename(moved)
    assert sets_up("mae") and not sets_up("mae")


def test_a_set_up_that_failed_is_not_believed_complete(project):
    assert project.launch("mae")[0].returncode == 0
    pyproject = (project.root / "pyproject.toml").read_text()
    (project.root / "pyproject.toml").write_text(pyproject + "\n")
    done, ran = project.launch("mae", PIP_EXIT="1")
    assert done.returncode == 1 and len(ran) == 1 and str(project.environment) in done.stderr
    (project.root / "pyproject.toml").write_text(pyproject)  # what was complete before is not any more
    assert project.launch("mae")[1][0].startswith("pip ")


def test_an_active_environment_keeps_its_torch(project, tmp_path):
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cpu\n"
    script(tmp_path / "modules/torch-2.13.0+cpu.dist-info/METADATA", metadata)
    done, ran = project.launch("mae")
    assert ran[0].endswith("-e . torch==2.13.0+cpu") and "2.13.0+cpu" in done.stdout


def test_conda_counts_as_active_but_its_base_does_not(project):
    conda = {"VIRTUAL_ENV": "", "CONDA_PREFIX": str(project.environment), "PYTHON": "no-such-python"}
    assert project.launch("mae", **conda, CONDA_DEFAULT_ENV="vision")[0].returncode == 0
    done, ran = project.launch("mae", **conda, CONDA_DEFAULT_ENV="base")
    assert done.returncode == 1 and not ran and "no-such-python" in done.stderr


def test_a_python_too_old_is_refused_in_one_sentence(project, tmp_path):
    old = tmp_path / "old/python3"
    script(old, "#!/bin/sh\nexit 1\n")  # what an old Python answers when asked whether it is new enough
    done, _ = project.launch("mae", VIRTUAL_ENV="", PYTHON=str(old))
    assert done.returncode == 1 and "3.11" in done.stderr and len(done.stderr.splitlines()) == 1
    script(project.environment / "bin/python", old.read_text())
    done, _ = project.launch("mae")
    assert done.returncode == 1 and "deactivate" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_newest_python_that_really_runs_makes_the_venv(project, tmp_path):
    minors = {"python3": 11, "python3.11": 11, "python3.12": 12, "python3.13": None}  # 3.13: a shim that only pretends
    for name, minor in minors.items():
        answer = "exit 127" if minor is None else f"case $2 in *ensurepip*) exit 1 ;; *) echo {minor} ;; esac"
        script(tmp_path / f"bin/{name}", f"#!/bin/sh\n{answer}\n")
    done, ran = project.launch("mae", VIRTUAL_ENV="", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 1 and not ran
    assert done.stderr.startswith("launch.sh: python3.12 cannot make virtual environments") and "-venv" in done.stderr


def half_made(venv, folder):
    """Put a stub of an environment there that is not whole; returns a Python that only says how it would make one."""
    script(venv / "bin/python", PYTHON)
    script(venv / "bin/accelerate", ACCELERATE)
    maker = folder / "maker/python3"
    log_venv = 'if [ "$1 $2" = "-m venv" ]; then echo "venv ${*:3}" >>"$LOG"; exit; fi'
    script(maker, f'#!/usr/bin/env bash\n{log_venv}\nexec "{sys.executable}" "$@"\n')
    return maker


@pytest.mark.parametrize("broken", ["no pip", "of another place"])
def test_a_venv_that_is_not_whole_is_made_anew(project, tmp_path, broken):
    venv = project.root / ".venv"
    maker = half_made(venv, tmp_path)
    if broken == "of another place":  # a copy: its pip belongs to the project it was copied from
        script(venv / "bin/pip", "#!/bin/sh\necho 'pip 1 from /elsewhere/.venv/lib/pip (python 3.11)'\n")
    done, ran = project.launch("mae", VIRTUAL_ENV="", PYTHON=str(maker))
    assert done.returncode == 0, done.stderr
    assert ran[0] == f"venv --clear {venv}"
    assert ran[1].startswith("pip ") and ran[1].endswith("-e . -c constraints.txt")


def test_all_gpus_are_named_and_used(project, tmp_path):
    gpus = """
cuda.is_available, cuda.device_count = lambda: True, lambda: 2
cuda.get_device_name = lambda i: "NVIDIA H200"
cuda.get_device_properties = lambda i: types.SimpleNamespace(total_memory=139 * 2**30)
"""
    script(tmp_path / "modules/torch.py", TORCH + gpus)
    done, ran = project.launch("mae")
    assert "Device: 2 × NVIDIA H200 (139 GiB each)\n" in done.stdout
    flags = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --multi_gpu"
    assert ran[1].startswith(f"python ssl_vit/launcher.py {flags} ssl_vit/pretrain.py")


def test_a_gpu_that_torch_cannot_use_is_a_warning_with_the_remedy(project):
    script(project.environment / "bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    done, _ = project.launch("mae")
    assert done.returncode == 0 and "Device: CPU" in done.stdout
    assert "NVIDIA H200" in done.stderr and "driver" in done.stderr
    assert "unset CUDA_VISIBLE_DEVICES" in project.launch("mae", CUDA_VISIBLE_DEVICES="")[0].stderr


def test_the_tests_run_on_all_cores_with_one_thread_each(project):
    done, ran = project.launch("test", "-k", "some")
    assert done.returncode == 0, done.stderr
    assert ran[0] == "pip -q -e .[test]" and ran[1] == "pytest -q -n auto -k some threads=1"
    assert project.launch("test", "-n0")[1] == ["pytest -q -n0 threads="]


CHECKS = ["ruff check .", "ruff format --check .", "codespell", "mypy"]
CHECKS += ["pytest -q --doctest-modules ssl_vit eval tests/test_docs.py threads="]


@pytest.mark.parametrize("fails", ["", "ruff", "mypy"])
def test_every_check_runs_and_one_that_fails_fails_all(project, fails):
    done, ran = project.launch("check", FAILS=fails)
    assert ran == ["pip -q -e .[dev]", *CHECKS] and done.returncode == bool(fails), done.stderr


def test_check_takes_no_arguments(project):
    done, ran = project.launch("check", "--fix")
    assert done.returncode == 2 and not ran and "no arguments" in done.stderr


def test_the_lowest_versions_are_those_of_pyproject():
    """As the command of CONTRIBUTING.md finds them."""
    [line] = [line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line.startswith("sed ")]
    command = line.partition(" >")[0]
    pins = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert set(pins) == {text.replace(">=", "==") for text in asked if not text.startswith("ssl_vit[")}


def test_constraints_are_exact_versions_without_addresses_or_local_builds():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, version = line.split("==")
        assert name.replace("-", "").replace("_", "").isalnum() and version.replace(".", "").isalnum()


@pytest.mark.parametrize("name", ["launch.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(name):
    assert os.access(ROOT / name, os.X_OK)
    assert subprocess.call(["bash", "-n", str(ROOT / name)]) == 0
