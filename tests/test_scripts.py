"""Every script starts, from anywhere, with nothing of ours in the way of an installed package."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import ROOT, environment

SCRIPTS = [
    "ssl_vit/pretrain.py",
    "eval/knn.py",
    "eval/linear_probe.py",
    "eval/finetune.py",
    "eval/predict.py",
    "eval/embed.py",
    "ssl_vit/export.py",
    "eval/robustness.py",
    "eval/difficulty.py",
    "eval/report.py",
    "eval/study.py",
    "eval/verdict.py",
]
LOOP = {"finetune.py", "study.py", "difficulty.py"}  # those that may read recipes by the loop, or start it


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_module_form(script, tmp_path):
    """As a script with transformers imported first by the interpreter, and with -m; help names every key."""
    (tmp_path / "sitecustomize.py").write_text("import transformers, timm\n")
    variables = environment()
    variables["PYTHONPATH"] += f":{tmp_path}"
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], env=variables, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    module = script.removesuffix(".py").replace("/", ".")
    again = subprocess.run(
        [sys.executable, "-m", module, "--help"], env=environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "python" in result.stdout
    if "pretrain" in script:
        assert all(key in result.stdout for key in ("train.epochs", "optim.lr", "runtime.per_device_batch_size"))


@pytest.mark.parametrize("folder", ["ssl_vit", "eval"])
def test_no_file_bears_the_name_of_an_installed_module(folder):
    """A script's own folder comes first on the import path, so its neighbours shadow what is installed."""
    names = {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"}
    code = (
        "import importlib.util, sys; "
        f"print([n for n in {sorted(names)} if n in sys.stdlib_module_names or importlib.util.find_spec(n)])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment(), capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_eval_imports_no_objective_and_objectives_no_loop():
    def imported(folder, without=()):
        text = "".join(p.read_text() for p in (ROOT / folder).glob("*.py") if p.name not in without)
        return [line for line in text.splitlines() if line.startswith(("import ", "from "))]

    assert not [line for line in imported("eval") if "objectives" in line]
    assert not [line for line in imported("eval", without=LOOP) if "pretrain" in line]
    inner = imported("ssl_vit/objectives")
    assert not [
        line
        for line in inner
        if any(w in line for w in ("pretrain", "ssl_vit.data", "ssl_vit import data", "eval.", "monitor"))
    ]
    assert importlib.util.find_spec("ssl_vit") and Path(ROOT / "recipes").is_dir()
