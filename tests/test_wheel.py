"""A wheel, installed into a folder of its own and started from an empty one: what the checkout does, it does."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_loop import ROOT

from ssl_vit import __version__

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
TINY = ["train.flops=null", "train.steps=2", "train.batch_size=16", "monitor.trackers=none", "backbone.embed_dim=16"]
TINY += ["backbone.depth=1", "backbone.num_heads=2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy without what an earlier build left: setuptools would pack that too."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, place)
    for name in ("ssl_vit", "eval", "recipes"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(place / "dist"), str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((place / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    checkout = tmp_path_factory.mktemp("another project")  # in which the environment lies, as many do
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"]
    subprocess.run(["git", "-C", str(checkout), *commit], check=True)
    folder = checkout / "packages"
    command = [*PIP, "install", "--no-index", "--no-deps", "--target", str(folder), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.matrix
def test_the_wheel_holds_every_module_recipe_and_style_and_nothing_else(wheel):
    kinds = {".py", ".yaml", ".css"}
    expected = {
        str(p.relative_to(ROOT)) for name in ("ssl_vit", "eval") for p in (ROOT / name).rglob("*") if p.suffix in kinds
    }
    expected |= {f"ssl_vit/{p.relative_to(ROOT)}" for p in (ROOT / "recipes").rglob("*.yaml")}
    files = zipfile.ZipFile(wheel).namelist()
    assert {f for f in files if ".dist-info/" not in f} == expected
    assert wheel.name.startswith(f"ssl_vit-{__version__}-py3-none-any")
    assert f"ssl_vit-{__version__}.dist-info/licenses/LICENSE" in files


@pytest.mark.matrix
def test_an_installed_wheel_pretrains_evaluates_and_studies(installed, tmp_path):
    variables = os.environ | dict(PYTHONPATH=str(installed))
    here = tmp_path / "empty"
    here.mkdir()

    def start(*words, code=0):
        command = [str(installed / "bin" / "ssl-vit"), *map(str, words)]
        done = subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    # the checkout, which an editable installation would offer too, has no part in it
    probe = (
        "import sys, eval.study, eval.report, eval.finetune, ssl_vit.pretrain, ssl_vit.recipe as r\n"
        "ours = [m for n, m in sys.modules.items() if n.split('.')[0] in ('eval', 'ssl_vit')]\n"
        "print(*{m.__file__ for m in ours}, r.RECIPES, sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", probe], cwd=here, env=variables, capture_output=True, text=True)
    files = found.stdout.splitlines()
    assert len(files) > 20 and all(Path(file).is_relative_to(installed) for file in files), found.stdout + found.stderr

    said = start("pretrain", "--recipe", "mae", *TINY, "--output", "run")
    assert "evaluate it: ssl-vit knn --backbone run\n" in said
    said = start("pretrain", "--recipe", "mae", *TINY, "train.seed=1", "--output", "run", code=2)
    command = f"ssl-vit pretrain --recipe mae {' '.join(TINY)} train.seed=1 --output run-2"
    assert said.endswith(f"Start a new one: {command}\n")
    assert "| run " in start("knn", "--backbone", "run", "pixels")
    rows = [json.loads(line) for line in (here / "run/results.jsonl").read_text().splitlines()]
    assert "  commit: null\n" in (here / "run/recipe.yaml").read_text()
    # of no commit: not that of a checkout in which the installation happens to lie
    assert {(row["commit"], row["versions"]["ssl_vit"]) for row in rows} == {(None, __version__)}

    plan = f"seeds: 1\nsettings: {json.dumps(TINY)}\narms:\n  mae: {{recipe: mae}}\nevaluators:\n  - [knn]\n"
    (here / "tiny.yaml").write_text(plan)
    commands = start("study", "tiny.yaml", "--dry-run").splitlines()
    assert [shlex.split(line)[1] for line in commands] == [
        f"{installed}/{file}" for file in ("ssl_vit/pretrain.py", "eval/knn.py")
    ]
    start("study", "tiny.yaml", "--jobs", "1")
    assert "ssl-vit report --study runs/tiny-digits" in (here / "runs/tiny-digits/report/report.md").read_text()
