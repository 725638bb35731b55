"""A whole deciding study, in miniature: tuned, trained, evaluated, packed, lost and gone on with."""

import sys

import pytest
import yaml
from conftest import SMALL
from test_loop import TINY

from eval import study
from eval.schedule import plans

BUDGET, TRIAL = 3e8, 2e8
EVALUATION = ["train.steps=3", "train.batch_size=32"]


def miniature(name: str) -> dict:
    """That plan with a tiny model, two seeds and a few steps of everything, for the digits."""
    plan = yaml.safe_load((plans.PLANS / f"{name}.yaml").read_text())
    plan |= dict(seeds=2, budgets=[BUDGET], settings=TINY)
    plan["tuning"] |= dict(flops=TRIAL, judge=["knn", "--labels", "50%"])
    arms = plan["arms"]
    arms["noise"]["search_space"] = ["objective.noise_sigma=[0,1.4142]", "objective.noise_pca_dim=2"]
    for arm in arms.values():
        if arm.get("recipe") in ("mae", "gaussian"):
            arm["settings"] = [*arm.get("settings", []), *SMALL[arm["recipe"]]]
    for arm in (plan, *(arm for arm in arms.values() if "evaluators" in arm)):
        arm["evaluators"] = [[*map(str, line)] for line in arm["evaluators"]]
        for line in arm["evaluators"]:
            line[:] = [word for word in line if not word.startswith("train.")]
            line += EVALUATION if line[0] == "finetune" else []
        arm["evaluators"] = [
            line if line[0] == "finetune" else ["knn", "--labels", "50%"] for line in arm["evaluators"]
        ]
    return plan


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with runs/ and packed/ of a study that ran to its end."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(miniature("denoising-gpu"), sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", WORDS)
        assert study.main() == 0
    return folder


WORDS = ["study.py", "tiny.yaml", "--data", "digits", "--jobs", "2", "--results", "packed"]


def test_it(done):
    print(sorted(p.name for p in (done / "packed/runs").iterdir()))
