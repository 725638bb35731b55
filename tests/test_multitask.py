"""Several objectives on one backbone: each as it is alone, together what the weights say, however the batch is cut."""

import json

import conftest
import pytest
import torch
import yaml
from conftest import SMALL, make_batch, small_objective
from PIL import Image
from safetensors.torch import load_file
from test_loop import (
    ROOT,
    SCRIPT,
    TORCHRUN,
    Started,
    arguments,
    killed,
    launched,
    log_of,
    run,
    untimed,
)
from test_objectives import gradients

from ssl_vit import flops, objectives, optim, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.objectives import multitask
from ssl_vit.objectives.base import Batch
from ssl_vit.randomness import Draw

MIXED = "supervised objective.mixup=0.8 objective.cutmix=1"


@pytest.fixture(autouse=True)
def _with_the_small_ones(monkeypatch):
    monkeypatch.setitem(SMALL, "multitask", [tasks("mae", "gaussian")])


def tasks(*names: str) -> str:
    """The setting of these tasks, each as small as the tests have it."""
    small = [[s for s in SMALL.get(name.split()[0], []) if s.startswith("objective.")] for name in names]
    return f"objective.tasks={json.dumps([' '.join([n, *s]) for n, s in zip(names, small, strict=True)])}"


def alone(objective, own, rows: torch.Tensor, place: int) -> tuple[float, dict]:
    """What the task alone makes of these rows, with the views and the random numbers that it has among others."""
    name = objective.names[place]
    everything = make_batch(objective, rows, dtype=torch.float64)
    views = {view: everything.views[f"{objective.makers[place]}/{view}"] for view in own.views}
    draw = Draw(0, everything.step, rows).fold_in(name)
    own.zero_grad()
    loss = own(Batch(views, everything.labels, draw, everything.step, everything.total))["loss"]
    loss.backward()
    return loss.item(), {n: p.grad for n, p in own.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mix", ["all", "rows"])
@pytest.mark.parametrize("names", [["mae", "gaussian"], ["beit", "supervised"], ["simmim", "dino", "mae"]])
def test_the_loss_is_the_weighted_sum_of_the_tasks_alone(names, mix):
    w, n = [2.0, 0.5, 0.25][: len(names)], len(names)
    backbone = ["backbone.pos_embed=sincos", "backbone.drop_path_rate=0.2"]
    settings = [tasks(*names), f"objective.mix={mix}", f"objective.loss_weights={w}", *backbone]
    objective = small_objective("multitask", *settings).double()
    rows = torch.arange(12)
    total, found = gradients(objective, [rows])
    expected_total, shared = 0.0, {}
    for place, name in enumerate(names):
        own = small_objective(name, *backbone)
        if "supervised" in names and name != "supervised":
            own.backbone.add_classifier(5)
        own = own.double()
        own.load_state_dict(objective.tasks[place].state_dict())
        part = rows if mix == "all" else rows[rows % n == place]
        loss, grads = alone(objective, own, part, place)
        scale = w[place] / (1 if mix == "all" else n)
        expected_total += scale * loss
        for key, grad in grads.items():
            key = key if key.startswith("backbone.") else f"tasks.{place}.{key}"
            shared[key] = shared.get(key, 0) + scale * grad
    assert total == pytest.approx(expected_total, rel=1e-12)
    assert found.keys() == shared.keys()
    for key, grad in shared.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mix", ["all", "rows"])
@pytest.mark.parametrize("names", [["mae", "gaussian"], ["mae", "dino", MIXED]])
def test_a_batch_cut_into_micro_batches_is_the_same(names, mix):
    settings = [tasks(*names), f"objective.mix={mix}", "backbone.drop_path_rate=0.2"]
    objective = small_objective("multitask", *settings).double()
    rows = torch.arange(48 if len(names) == 3 else 64)
    whole, expected = gradients(objective, [rows])
    buffers = {n: b.clone() for n, b in objective.named_buffers()}
    parts, found = gradients(objective, list(rows.split(len(rows) // 4)))
    assert parts == pytest.approx(whole, rel=1e-12)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-8)  # dino's positions are resampled in float32
    for key, value in objective.named_buffers():
        torch.testing.assert_close(value, buffers[key], rtol=1e-9, atol=1e-12)


def test_mixed_pairs_and_whole_rounds_stay_together():
    objective = small_objective("multitask", tasks("mae", "gaussian", MIXED))
    assert objective.micro_batch_multiple == 6 and objective.labelled
    seen = [objective.part(make_batch(objective, torch.arange(12, 24)), place).draw.rows.tolist() for place in range(3)]
    assert seen == [[12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]
    assert small_objective("multitask", tasks("mae", MIXED), "objective.mix=all").micro_batch_multiple == 2
    assert small_objective("multitask", tasks("mae", "gaussian")).micro_batch_multiple == 2


def test_tasks_do_not_share_their_draws_but_equal_views():
    twice = ["mae", "mae objective.mask_ratio=0.5", "dino"]
    objective = small_objective("multitask", tasks(*twice), "objective.mix=all")
    assert objective.names == ["mae-1", "mae-2", "dino"]
    assert set(objective.views) == {"mae-1/image", "dino/global1", "dino/global2", "dino/local"}
    batch = make_batch(objective, torch.arange(8))
    a, b = (objective.part(batch, place) for place in (0, 1))
    assert torch.equal(a.views["image"], b.views["image"])
    assert not torch.equal(a.draw.uniform("mask", 64), b.draw.uniform("mask", 64))
    assert {"loss", "mae-1_loss", "mae-2_loss", "dino_loss", "dino_kl"} <= set(objective(batch))


def test_the_backbone_is_there_once():
    objective = small_objective("multitask", tasks("dino", "mae", "supervised"), "optim.layer_decay=0.5")
    assert all(task.backbone is objective.backbone for task in objective.tasks)
    assert objective.exported is objective.backbone
    optimizer = optim.build(objective, recipes.Optim(layer_decay=0.5), 1.0)
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    assert len(everything) == len(set(everything)) and set(everything) == trained
    assert {id(p) for p in objective.backbone.parameters() if p.requires_grad} < trained
    assert {group["lr_scale"] for group in optimizer.param_groups} > {1.0, 0.5}


def test_what_is_shared_is_copied_with_its_classifier():
    """Whichever task comes first: averages of the backbone follow all of it."""
    objective = small_objective("multitask", tasks("dino", "supervised"))
    batch = make_batch(objective, torch.arange(8))
    objective.begin_step()
    objective(batch)["loss"].backward()
    with torch.no_grad():
        objective.backbone.model.head.weight += 1.0
    objective.on_optimizer_step(0, 10, lambda t: t)
    assert objective.tasks[0].teacher.model.head.weight.mean() > 0
    assert not objective.tasks[0].teacher.training and objective.backbone.training


@pytest.mark.parametrize("names", [["mae", "gaussian"], ["dino", "mae", MIXED]])
def test_flops_are_the_mean_or_the_sum_of_the_tasks(names):
    each = [
        flops.per_image(o, 3, o.labelled)
        for o in (small_objective(name.split()[0], *name.split()[1:]) for name in names)
    ]
    for mix, expected in (("all", sum(each)), ("rows", sum(each) / len(each))):
        objective = small_objective("multitask", tasks(*names), f"objective.mix={mix}")
        assert flops.per_image(objective, 3, objective.labelled) == pytest.approx(expected, rel=1e-9)


def test_fits_alarms_and_whole_batches_are_those_of_the_tasks():
    objective = small_objective("multitask", tasks("beit", "dino"))
    assert objective.requires_fit and objective.tasks[0].target.centroids.any()
    assert not small_objective("multitask").requires_fit
    largest = torch.log(torch.tensor(32.0)).item()
    logged = {"loss": 1.0, "beit_loss": 1.0, "dino_kl": 0.001, "dino_teacher_entropy": largest}
    assert objective.alarm(logged).startswith("The task dino: DINO has collapsed")
    assert objective.alarm(logged | {"dino_teacher_entropy": largest / 2, "dino_kl": 0.8}) is None
    assert objective.batch_statistics is objective.requires_full_batch is None
    tied = small_objective("multitask", tasks("mae", "dino").replace("use_bn_in_head=false", "use_bn_in_head=true"))
    assert (
        tied.requires_full_batch is None and tied.batch_statistics == "objective.use_bn_in_head=true of the task dino"
    )


def test_frozen_layers_stay_and_pictures_are_named_after_their_task():
    objective = small_objective("multitask", tasks("mae", "dino"))
    objective(make_batch(objective, torch.arange(8)))["loss"].backward()
    objective.before_optimizer_step(0, 1000)
    assert all(p.grad is None for p in objective.tasks[1].head.last.parameters())
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        shown = objective.eval().show(images, Draw(0, 0, torch.arange(4)))
    assert set(shown) == {"mae_reconstruction", "dino_attention"} and objective.shows
    with torch.no_grad():
        alone = objective.tasks[0].show(images, Draw(0, 0, torch.arange(4)))["reconstruction"]
    assert torch.equal(shown["mae_reconstruction"].panels, alone.panels)  # the same mask as without other tasks
    assert not small_objective("multitask", tasks("supervised", "mae")).tasks[0].shows


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("objective.tasks=[mae]", ["objective.tasks", "two recipes or more"]),
        ("objective.tasks=[]", ["objective.tasks", "two recipes or more"]),
        ("objective.tasks=[mae, maee]", ["objective.tasks", "'maee'", "Did you mean 'mae'"]),
        ("objective.tasks=[mae, multitask]", ["objective.tasks", "multitask is itself several tasks"]),
        ("objective.tasks=[mae, gaussian train.epochs=3]", ["objective.tasks", "'train.epochs=3'", "key=value"]),
        ("objective.tasks=[mae, gaussian objective.rato=1]", ["'gaussian objective.rato=1'", "'objective.mask_ratio'"]),
        ("objective.tasks=[mae, gaussian objective.mask_ratio=2]", ["the task 'gaussian", "at most"]),
        ("objective.tasks=[mae, 'gaussian objective.noise_sigma=[0, 1]']", ["'1]'", "without blanks or in quotes"]),
        ("objective.tasks=[mae, 'gaussian \"']", ["objective.tasks", "must be a recipe"]),
        ("objective.tasks=[mae, '']", ["objective.tasks", "must be a recipe"]),
        ("objective.loss_weights=[1]", ["objective.loss_weights", "1 values for 2 tasks"]),
        ("objective.loss_weights=[1, 0]", ["objective.loss_weights", "above 0"]),
        ("objective.mix=both", ["objective.mix", "rows or all"]),
        ("objective.tasks=[mae, gaussian objective.decoder_num_heads=3]", ["The task gaussian", "decoder_num_heads=3"]),
        ("objective.tasks=[supervised, supervised, mae]", ["supervised-1 and supervised-2", "one classifier"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(setting, words):
    with pytest.raises(UserError) as error:
        small_objective("multitask", setting)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_task_that_needs_labels_is_refused_without(tmp_path):
    with pytest.raises(UserError, match="The task supervised needs labels"):
        small_objective("multitask", tasks("mae", "supervised"), classes=None)
    for i in range(8):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(tmp_path / f"{i}.png")
    labelled = [tasks("mae", "supervised"), "--data", str(tmp_path), "--output", "run"]
    started = Started(tmp_path, *arguments("multitask", *labelled))
    assert started.wait() == 2
    assert "The task supervised needs labels" in started.said and "Traceback" not in started.said


def test_the_record_holds_every_setting_that_a_task_reads():
    read = conftest.small_recipe("multitask", "objective.tasks=[mae objective.mask_ratio=0.5, simmim]").as_dict()
    again = conftest.small_recipe("multitask", f"objective.tasks={json.dumps(read['objective']['tasks'])}").as_dict()
    assert again["objective"] == read["objective"]
    mae, simmim = read["objective"]["tasks"]
    assert (
        "objective.mask_ratio=0.5" in mae
        and 'objective.encoder_input="mask_token"' in simmim
        and "objective.norm_pix_loss=true" in mae
        and "objective.vocab_size" not in mae
    )


@pytest.mark.parametrize("name", sorted(set(objectives.names()) - {"multitask"}))
def test_a_task_in_full_is_in_full(name):
    for recipe in recipes.recipes_of(name):
        once = multitask.in_full(recipe)
        assert multitask.in_full(once) == once
        assert multitask.read_task(once).objective == multitask.read_task(recipe).objective


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    several = [tasks("beit", "dino", MIXED), "train.batch_size=24", "backbone.drop_path_rate=0.2"]
    run(tmp_path, *arguments("multitask", *several, "--output", str(whole)))
    for at in (1, 6, 9):  # before the first checkpoint, between two, after the second
        killed(tmp_path, at, *arguments("multitask", *several, "--output", str(parts)))
    run(tmp_path, *arguments("multitask", *several, "--output", str(parts)))
    for file in ("model.safetensors", "config.json"):
        assert (parts / "backbone" / file).read_bytes() == (whole / "backbone" / file).read_bytes()
    lines = [[line for line in untimed(r) if "loss" in line] for r in (whole, parts)]  # and no alarms
    assert lines[0] == lines[1] and {"beit_loss", "dino_loss", "supervised_accuracy"} <= set(lines[0][-1])
    assert {p.name for p in (whole / "pictures").iterdir()} == {"beit_reconstruction.png", "dino_attention.png"}
    assert weights.load(str(whole)).depth == 2


def test_another_recipe_behind_a_task_is_another_run(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((ROOT / "recipes" / "simmim.yaml").read_text())
    two = [f"objective.tasks={json.dumps([str(own), 'simmim'])}", "--output", "run"]
    run(tmp_path, *arguments("multitask", *two))
    assert "own_loss" in log_of(tmp_path / "run")[-1]
    own.write_text(yaml.safe_dump(yaml.safe_load(own.read_text()) | dict(objective=dict(name="reconstruct"))))
    other = Started(tmp_path, *arguments("multitask", *two))
    assert other.wait() == 2 and "with other settings" in other.said and "objective.tasks" in other.said


def test_two_processes_equal_one(tmp_path, alone):
    several = [tasks("mae", "dino", MIXED), "train.batch_size=48", "train.steps=6"]
    run(tmp_path, *arguments("multitask", *several, "--output", "one"))
    two = launched([*TORCHRUN, SCRIPT, *arguments("multitask", *several, "--output", "two")], tmp_path)
    said, _ = two.communicate(timeout=180)
    assert two.returncode == 0, said
    one, both = (load_file(tmp_path / r / "backbone/model.safetensors") for r in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(both[key], weight, rtol=0, atol=2e-4)
    for key in ("loss", "mae_loss", "dino_loss", "supervised_loss"):
        found = [[line[key] for line in log_of(tmp_path / r) if "alarm" not in line] for r in ("one", "two")]
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(tmp_path):
    three = [tasks("mae", "gaussian", MIXED), "train.batch_size=32", "--output", "run"]
    started = Started(tmp_path, *arguments("multitask", *three))
    assert started.wait() == 2
    assert "groups of 6 images" in started.said and "train.batch_size to a multiple of 6" in started.said


@pytest.mark.parametrize("mix", ["rows", "all"])
def test_every_task_learns(tmp_path, mix):
    """On the digits: each loss, averaged over the last steps, is well below where it began."""
    several = [tasks("mae", "gaussian", "supervised"), f"objective.mix={mix}", "train.batch_size=96", "train.steps=100"]
    quick = ["views.augmentation=none", "backbone.embed_dim=32", "optim.lr=3e-2"]
    run(tmp_path, *arguments("multitask", *several, *quick, "--output", "run"))
    lines = log_of(tmp_path / "run")
    for name in ("mae", "gaussian", "supervised"):
        curve = [line[f"{name}_loss"] for line in lines]
        assert sum(curve[-10:]) / 10 < 0.95 * sum(curve[:5]) / 5
