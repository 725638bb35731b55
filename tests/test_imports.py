"""Objectives and timm models outside of the package, by `--import`, as a user would have them."""

import subprocess
import sys

import pytest
from test_loop import ROOT, environment

from ssl_vit import commands, imports, objectives

OWN = """
from dataclasses import dataclass

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl_vit import objectives
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import setting

default_cfgs = generate_default_cfgs(
    {"ssl_vit_nano": dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, first_conv="patch_embed.proj",
                          classifier="head", num_classes=0)}
)


@register_model
def ssl_vit_nano(pretrained=False, **kwargs):
    shape = dict(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2) | kwargs
    return build_model_with_cfg(VisionTransformer, "ssl_vit_nano", pretrained, **shape)


@dataclass
class TurnsConfig:
    turns: int = setting(4, "number of quarter turns to tell apart", at_least=2, at_most=4)


@objectives.register("turns")
class Turns(Objective):
    Config = TurnsConfig

    def __init__(self, config, backbone, info):
        super().__init__(config, backbone, info)
        self.views = info.single_view()
        self.head = nn.Linear(backbone.embed_dim, config.turns)

    def forward(self, batch):
        turn = batch.draw.bits("turn").remainder(self.config.turns)
        images = batch.views["image"]
        turned = sum(images.rot90(k, (2, 3)) * (turn == k)[:, None, None, None] for k in range(self.config.turns))
        logits = self.head(self.backbone.pool(self.backbone(turned, draw=batch.draw)))
        return dict(loss=F.cross_entropy(logits.float(), turn))
"""
RECIPE = """
train: {steps: 4, batch_size: 16}
objective: {name: turns, turns: 3}
backbone: {name: ssl_vit_nano}
"""


def command(folder, script, *words, code=0):
    found = subprocess.run(
        [sys.executable, str(ROOT / script), *words], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert found.returncode == code, found.stdout + found.stderr
    return found.stdout + found.stderr


def test_an_objective_and_a_backbone_outside_of_the_package(tmp_path):
    """Trained, resumed, evaluated, exported; and trained by another process, as in a study."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "turns.yaml").write_text(RECIPE)
    train = ["--recipe", "turns.yaml", "--data", "digits"]
    assert "Unknown objective 'turns'" in (said := command(tmp_path, "ssl_vit/pretrain.py", *train, code=2))
    assert "if its module is named by --import" in said
    said = command(tmp_path, "ssl_vit/pretrain.py", *train, "--import", "mine", "--output", "run")
    assert f"--import {tmp_path}/mine --backbone run" in said
    assert "finished" in command(tmp_path, "ssl_vit/pretrain.py", "--import=mine.py", *train, "--output", "run").lower()
    (again := tmp_path / "again").mkdir()
    said = command(again, "eval/knn.py", "--backbone", "../run", "--import", "../mine.py")
    assert "0." in said or "%" in said
    refused = command(again, "eval/knn.py", "--backbone", "../run", code=2)
    assert "ssl_vit_nano" in refused and "--import" in refused
    said = command(again, "ssl_vit/export.py", "../run", "--to", "torch", "--import", str(tmp_path / "mine"))
    assert "model.pt2" in said


def test_a_module_that_is_not_there_or_hidden_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(imports.VARIABLE, "")
    with pytest.raises(
        imports.NotFound, match=f"--import mine: there is no such module in {tmp_path}, nor an installed one"
    ):
        imports.load(["--import", "mine"])
    monkeypatch.setenv(imports.VARIABLE, "")
    (tmp_path / "statistics.py").write_text("")
    with pytest.raises(imports.NotFound, match=f"before {tmp_path}/statistics.py: give yours another name"):
        imports.load(["--import=statistics"])
    monkeypatch.setenv(imports.VARIABLE, "")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/__init__.py").write_text("")
    with pytest.raises(imports.NotFound, match=f"before {tmp_path}/csv/__init__.py: give yours another name"):
        imports.load(["--import", "csv"])
    monkeypatch.setenv(imports.VARIABLE, "")
    with pytest.raises(imports.NotFound, match="--import json: there is no such module in /nowhere"):
        imports.load(["--import", "/nowhere/json.py"])  # nor is it Python's own
    monkeypatch.setenv(imports.VARIABLE, "")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        imports.load(["run", "--import", "broken"])


def test_processes_that_are_started_import_the_same(tmp_path):
    """As a study starts them: from a fork server, by words without --import."""
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "turns.yaml").write_text(RECIPE)
    (tmp_path / "start.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "from eval.schedule.processes import Command\nfrom ssl_vit import imports\n"
        "if __name__ == '__main__':\n"
        "    imports.load(['--import', 'mine'])\n"
        "    words = ['pretrain.py', '--recipe', 'turns.yaml', '--data', 'digits', '--output', 'run']\n"
        "    sys.exit(Command('ssl_vit.pretrain', words, Path('log'), {}).wait())\n"
    )
    found = subprocess.run(
        [sys.executable, "start.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert found.returncode == 0, (tmp_path / "log").read_text() + found.stderr
    assert (tmp_path / "run/backbone/model.safetensors").exists()


def test_a_name_of_ours_is_not_registered():
    with pytest.raises(ValueError, match="There is an objective 'dino' in ssl_vit: choose another name"):
        objectives.register("dino")


def test_two_modules_do_not_register_one_name(monkeypatch):
    monkeypatch.setattr(objectives, "REGISTERED", {})

    def made(module):
        return type("Mine", (objectives.base.Objective,), dict(__module__=module))

    assert objectives.register("mine")(made("a")).__module__ == "a"
    again = objectives.register("mine")(made("a"))  # as in a notebook
    assert objectives.find("mine") is again
    with pytest.raises(ValueError, match="There is an objective 'mine' in a: choose another name"):
        objectives.register("mine")(made("b"))


def test_commands_that_are_named_import_the_same(monkeypatch):
    monkeypatch.setenv(imports.VARIABLE, "/home/mine")
    assert commands.typed("knn")[-2:] == commands.documented("knn")[-2:] == ["--import", "/home/mine"]
    monkeypatch.setenv(imports.VARIABLE, "")
    assert imports.load(["a", "--data", "x", "--", "-y"]) == ["a", "--data", "x", "--", "-y"]
    with pytest.raises(SystemExit):
        commands.Parser("Does.").parse_args(["--imp", "mine.py"])
