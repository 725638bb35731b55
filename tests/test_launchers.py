"""torchrun, `accelerate launch` and Slurm: two launchers meet, stop together, and say what is wrong once."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import start
from test_engine import started
from test_loop import ROOT, SCRIPT, arguments, launched, log_of, steps_done, until

from ssl_vit import launcher, pretrain

ENDLESS = "train.steps=1000000"


def port() -> int:
    """A port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        number: int = one.getsockname()[1]
        return number


def launchers(kind: str, folder: Path, *settings: str) -> list[subprocess.Popen]:
    """A launcher with one process on each of two machines, both of which are this one."""
    meeting, both = str(port()), []
    words = [SCRIPT, *arguments("mae", *settings, "--output", "run")]
    for rank in "01":
        if kind == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{meeting}", "--rdzv_id", "1"]
        else:
            command = [sys.executable, str(ROOT / "ssl_vit/launcher.py"), "-q", "--multi_gpu", "--num_machines", "2"]
            command += ["--num_processes", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
            command += ["--main_process_port", meeting, "--mixed_precision", "no", "--dynamo_backend", "no"]
        both.append(launched([*command, *words], folder))
    return both


@pytest.mark.matrix
def test_torchrun_on_two_machines(tmp_path, alone):
    both = launchers("torchrun", tmp_path, "train.steps=6")
    said = [each.communicate(timeout=180)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["runtime"]["processes"] == 2
    assert log_of(tmp_path / "run")[-1]["step"] == 6 and (tmp_path / "run/backbone/config.json").exists()


@pytest.mark.matrix
def test_a_process_killed_on_one_of_two_machines_ends_both_and_a_signal_to_one_stops_both(tmp_path, alone):
    for way in ("kill", signal.SIGTERM, signal.SIGUSR1):
        both = launchers("accelerate", tmp_path, ENDLESS)
        before = steps_done(tmp_path / "run")
        until(lambda before=before: steps_done(tmp_path / "run") >= before + 5)
        if way == "kill":
            os.kill(int((tmp_path / "run/.lock.holder").read_text().split()[0]), signal.SIGKILL)
        else:
            both[1].send_signal(way)
        said = [each.communicate(timeout=180)[0] for each in both]
        assert not any("Traceback" in text for text in said), said
        if way == "kill":
            assert 137 in [each.returncode for each in both]
            told = "".join(said)
            assert told.count("was ended by SIGKILL") == 1
            assert told.count("error:") == 1 + told.count("none here has said why") <= 2  # on the other machine
        else:
            assert both[1].returncode == 128 + way and both[0].returncode in (128 + way, 143), said
            assert "".join(said).count("Stopped after step") == 1 and "".join(said).count("error:") == 0


@pytest.mark.parametrize("given", [[], ["--num_machines", "3", "--machine_rank", "1"]])
def test_the_launcher_waits_for_a_save_and_takes_its_machine_from_slurm(given, monkeypatch):
    seen = []
    monkeypatch.setattr(launcher, "launch_command", seen.append)
    monkeypatch.setattr(sys, "argv", ["launcher.py", "--num_processes", "4", *given, SCRIPT, "--recipe", "mae"])
    monkeypatch.setattr(os, "environ", dict(os.environ, SLURM_STEP_NUM_NODES="2", SLURM_NODEID="0"))
    monkeypatch.setattr(launcher.logging, "disable", lambda level: None)
    assert launcher.main() == 0
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120"
    [arguments] = seen
    assert (arguments.num_machines, arguments.machine_rank) == ((3, 1) if given else (2, 0))
    assert {"SIGTERM", "SIGUSR1", "SIGUSR2", "SIGQUIT"} <= set(arguments.signals_to_handle.split(","))


def test_the_launcher_waits_for_a_single_process_too(tmp_path):
    words = [sys.executable, str(ROOT / "ssl_vit/launcher.py"), "-q", "--num_processes", "1", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    process = launched([*words, SCRIPT, *arguments("mae", ENDLESS, "--output", "run")], tmp_path)
    until(lambda: steps_done(tmp_path / "run") >= 3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 143 and said.count("Stopped after step") == 1 and "Traceback" not in said, said
    process = launched([*words, SCRIPT, *arguments("mae", "train.batch_size=0")], tmp_path)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 2 and said.count("error:") == 1 and "Traceback" not in said, said
    process = launched([*words, "--multi_gpu", SCRIPT, *arguments("mae")], tmp_path)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 2 and "error: You need to use at least 2 processes" in said and "Traceback" not in said


def test_launchers_that_cannot_meet_are_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        number = str(taken.getsockname()[1])
        command = [sys.executable, str(ROOT / "ssl_vit/launcher.py"), "--multi_gpu", "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", "0", "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", number, "--mixed_precision", "no", "--dynamo_backend", "no", SCRIPT]
        process = launched(command, tmp_path)
        said, _ = process.communicate(timeout=180)
    assert process.returncode == 2 and "Traceback" not in said, said
    assert f"error: The launchers cannot meet at 127.0.0.1:{number} (" in said and "another --main_process_port" in said


@pytest.mark.parametrize("nodes", [1, 2])
def test_srun_python_with_several_tasks_is_refused_once_with_the_command(nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", str(nodes))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    tasks = []
    for rank in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        tasks.append(start(pretrain.main, tmp_path, tmp_path / "said.txt", *arguments("mae")))
    for task in tasks:
        task.join(60)
    said = (tmp_path / "said.txt").read_text()
    assert [task.exitcode for task in tasks] == [2, 2] and said.count("error:") == 1, said
    assert "srun started 4 tasks that do not know of each other" in said
    command = {
        1: "srun -n 1 -c 12 torchrun --standalone --nproc_per_node 4 ssl_vit/pretrain.py --recipe mae",
        2: "srun --ntasks-per-node=1 -c 6 torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint $(hostname):29500 "
        "--rdzv_id $SLURM_JOB_ID --nproc_per_node 2 ssl_vit/pretrain.py --recipe mae",
    }
    assert command[nodes] in said


@pytest.mark.parametrize("what", ["images", "settings", "code"])
def test_a_process_that_has_something_else_is_refused_once(what, tmp_path, monkeypatch, alone):
    identity = pretrain.identity

    def other(settings):
        return identity(settings) | ({what: "other"} if os.environ["RANK"] == "1" else {})

    monkeypatch.setattr(pretrain, "identity", other)
    several = started(tmp_path, "mae", "ddp", "--output", "run")
    assert several.wait()[1] == 2, several.said
    assert several.said.count("error:") == 1 and f"has different {what} from the first process" in several.said


def test_identity_is_of_images_settings_and_code():
    settings = dict(train=dict(seed=1), runtime=dict(num_workers=1), images=dict(fingerprint="abc"))
    own = pretrain.identity(settings)
    assert own["images"] == "abc"
    assert pretrain.identity(settings | dict(runtime={}))["settings"] == own["settings"]
    assert pretrain.identity(settings | dict(train=dict(seed=2)))["settings"] != own["settings"]


# -- Slurm ------------------------------------------------------------------------------------------------------------

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/spool%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=2
SwitchType=switch/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 CoresPerSocket=2 RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 CoresPerSocket=2 RealMemory=1000
PartitionName=cpu Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of two nodes, both of which are this machine."""
    missing = [name for name in ("slurmctld", "slurmd", "munged") if not shutil.which(name, path="/usr/bin:/usr/sbin")]
    if missing or os.geteuid():
        pytest.skip(f"Slurm needs {', '.join(missing) or 'root'}: apt-get install slurm-wlm munge")
    folder = tmp_path / "slurm"
    folder.mkdir()
    file = folder / "slurm.conf"
    ports = [port() for _ in range(3)]
    file.write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports))
    monkeypatch.setenv("SLURM_CONF", str(file))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}")
    own = subprocess.run(["munge", "-n"], capture_output=True).returncode
    if own:
        subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge"], check=True)
        subprocess.run(["runuser", "-u", "munge", "--", "munged", "--force"], check=True)
    daemons = [
        subprocess.Popen([*words, "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for words in (["slurmctld"], ["slurmd", "-N", "n0"], ["slurmd", "-N", "n1"])
    ]
    try:
        until(lambda: "2 idle" in subprocess.run(["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True).stdout)
        yield folder
    finally:
        subprocess.run(["scancel", "-u", "root"])
        until(lambda: not subprocess.check_output(["squeue", "-h"]))
        for daemon in daemons:
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
        if own:
            subprocess.run(["runuser", "-u", "munge", "--", "munged", "--stop"])


def of(job: str, field: str) -> str:
    """A field of `scontrol show job`."""
    text = subprocess.check_output(["scontrol", "show", "job", job], text=True)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)[field]


@pytest.mark.matrix
def test_a_job_on_two_nodes_is_requeued_after_a_signal_and_goes_on(slurm, tmp_path, alone):
    """The script of docs/scaling.md."""
    text = (ROOT / "docs/scaling.md").read_text()
    _, _, script = text.partition("#!/bin/bash\n")
    script, _, _ = script.partition("```")
    words = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    for before, after in {
        "--gpus-per-node=8 --cpus-per-task=96": "--cpus-per-task=1 --output=said.txt",
        "ssl_vit/launcher.py": f"{ROOT / 'ssl_vit/launcher.py'} -q {' '.join(words)}",
        "--num_processes 16": "--num_processes 2",
        "29500": str(port()),
        "ssl_vit/pretrain.py --recipe mae-photos --data imagenet-1k": f"{SCRIPT} {' '.join(arguments('mae', ENDLESS))}",
    }.items():
        assert before in script
        script = script.replace(before, after)
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{script}")
    job = subprocess.check_output(["sbatch", "--parsable", "job.sh"], cwd=tmp_path, text=True).strip()
    run = tmp_path / "runs/mae-imagenet"
    until(lambda: steps_done(run) >= 5)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    until(lambda: of(job, "Restarts") == "1" and of(job, "JobState") == "PENDING")
    stopped = steps_done(run)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # not after two minutes
    until(lambda: steps_done(run) > stopped)
    said = (tmp_path / "said.txt").read_text()
    assert said.count("Stopped after step") == 1 and f"Resuming from step {stopped} of" in said
    assert "Traceback" not in said and "\nerror:" not in said
    subprocess.run(["scancel", job], check=True)
