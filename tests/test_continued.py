"""Continued pre-training: heads first with the backbone as it came, then all; k-NN before and after."""

import json

import pytest
import torch
from conftest import make_batch, small, small_objective, small_recipe
from safetensors.torch import load_file
from test_loop import TINY, log_of

from ssl_vit import monitor, objectives, optim, pretrain, recipe
from ssl_vit.recipe import Optim


def run(path, *settings, name="mae"):
    made = objectives.read_recipe(name, [*TINY, *small(name, *settings)], None)
    assert pretrain.pretrain(made, path) == 0
    return load_file(path / "backbone" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A run of no steps whose norm is none of the initial ones."""
    folder = tmp_path_factory.mktemp("old") / "run"
    run(folder, "train.steps=2", "train.seed=3")
    return folder


@pytest.mark.parametrize("name", ["mae", "simmim", "dino"])
def test_heads_are_fitted_first_and_the_backbone_stays_as_it_came(name, old, tmp_path, monkeypatch):
    """With the whole budget frozen nothing of the backbone moves, weight decay included; the heads do."""
    before = load_file(old / "backbone" / "model.safetensors")
    shape = [] if name != "dino" else ["backbone.pos_embed=sincos"]
    seen = {}
    finish = pretrain.finish

    def keep(run, recipe, objective, *rest):
        seen.update({k: v.clone() for k, v in objective.state_dict().items()})
        return finish(run, recipe, objective, *rest)

    monkeypatch.setattr(pretrain, "finish", keep)
    settings = [*shape, "train.steps=3", f"backbone.init_from={old}"]
    frozen = run(tmp_path / "frozen", *settings, "train.freeze_backbone_fraction=1", name=name)
    heads = dict(seen)
    assert same(frozen, before)
    after = run(tmp_path / "free", *settings, "train.freeze_backbone_fraction=0", name=name)
    assert not same(after, before)
    initial = run(tmp_path / "none", *shape, "train.steps=0", f"backbone.init_from={old}", name=name)
    assert same(initial, before)
    own = [
        key for key in seen if not key.startswith(("backbone.", "teacher", "student.backbone")) and seen[key].ndim > 1
    ]
    assert own and any(not torch.equal(heads[key], seen[key]) for key in own)


def test_the_backbone_starts_with_a_warm_up_of_its_own():
    objective = small_objective("supervised")
    optimizer = optim.build(objective, Optim(), 1.0, frozen=4)
    starts = {name: group["start"] for group in optimizer.param_groups for name, p in objective.named_parameters()
              if any(p is q for q in group["params"])}  # fmt: skip
    assert starts.pop("backbone.model.head.weight") == starts.pop("backbone.model.head.bias") == 0
    assert set(starts.values()) == {4} and "backbone.model.norm.weight" in starts
    config = Optim(warmup_fraction=0.25)
    rates = []
    for step in range(12):
        assert optim.set_schedule(optimizer, config, 1.0, step, 12) == optimizer.param_groups[-1]["lr"]
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:4] == [0.0] * 4 and rates[4:6] == [0.5, 1.0] and rates[6] == 1.0 and rates[-1] == pytest.approx(0)


def test_frozen_statistics_and_depth_stay_too():
    objective = small_objective("supervised", "backbone.drop_path_rate=0.5")
    batch = make_batch(objective, torch.arange(8))
    optim.freeze(objective, 3, 4)
    assert not objective.backbone.training and objective.training
    assert torch.equal(objective(batch)["loss"], objective(batch)["loss"])
    optim.freeze(objective, 4, 4)
    assert all(module.training for module in objective.modules())


def test_what_is_frozen_by_default():
    """A twentieth of a self-supervised run that starts from weights: not from scratch, and not fine-tuning."""
    for name, settings, steps in (
        ("mae", ["backbone.init_from=x"], 50),
        ("mae", [], 0),
        ("mae", ["train.freeze_backbone_fraction=0.1"], 100),
        ("supervised", ["backbone.init_from=x"], 0),
        ("supervised", ["backbone.init_from=x", "train.freeze_backbone_fraction=0.1"], 100),
    ):
        made = small_recipe(name, "train.steps=1000", *settings)
        assert made.frozen_steps(labelled=name == "supervised") == steps, (name, settings)
    assert recipe.FREEZE == 0.05


def test_it_reports_knn_before_and_after_and_resumes_to_the_same_weights(old, tmp_path, capsys):
    settings = [f"backbone.init_from={old}", "train.steps=8", "train.freeze_backbone_fraction=0.5"]
    whole = run(tmp_path / "whole", *settings)
    said = capsys.readouterr().out
    lines = log_of(tmp_path / "whole")
    before, after = (next(line for line in lines if line["step"] == step and "knn" in line) for step in (0, 8))
    assert f"{100 * before['knn_cls']:.1f} % before" in said and f"{100 * after['knn_cls']:.1f} % after" in said
    assert before["rank"] != after["rank"]

    class Stop(Exception):
        pass

    def stop(self, step, *rest):  # killed in the frozen part, and after it
        count(self, step, *rest)
        if step == at:
            raise Stop

    count = monitor.Monitor.step
    for at in (2, 6):
        path = tmp_path / f"at{at}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(monitor.Monitor, "step", stop)
            with pytest.raises(Stop):
                run(path, *settings, "runtime.save_every=1")
        assert same(run(path, *settings, "runtime.save_every=1"), whole)
        assert json.loads((path / "log.jsonl").read_text().splitlines()[0])["step"] == 0


def test_without_labels_it_reports_the_rank():
    log = [dict(step=0, rank=3.0), dict(step=4, loss=1.0), dict(step=4, rank=5.5)]
    assert monitor.gained(log, 4).startswith("Feature rank of 3.0 before and 5.5 after")


def test_the_optimizer_keeps_nothing_of_frozen_gradients():
    objective = small_objective("mae")
    optimizer = optim.build(objective, Optim(), 1.0, frozen=4)
    waiting = {id(p) for p in optim.encoder(objective)}
    assert waiting == {id(p) for p in objective.backbone.parameters() if p.requires_grad}
    for step, learning in ((3, 0), (4, len(waiting))):
        for weight in objective.parameters():
            weight.grad = torch.ones_like(weight)
        optim.drop_gradients(optimizer, step)
        optimizer.step()
        assert sum(id(p) in waiting for p in optimizer.state) == learning and len(optimizer.state) > learning
