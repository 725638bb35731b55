"""What a run says of itself while it trains: its speed, and k-NN on images that are not among the neighbours."""

import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, small_objective, small_recipe
from PIL import Image

from ssl_vit import checkpoint, data, monitor


def images_of(labels: torch.Tensor) -> data.ImageSet:
    """Unlike images with these labels."""
    pixels = torch.randint(0, 256, (len(labels), 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    return data.ImageSet(
        name="made up",
        split="train",
        labels=labels,
        classes=[str(i) for i in range(int(labels.max()) + 1)],
        fingerprint="0",
        channels=3,
        count=len(labels),
        size=(4, 4),
        images=pixels,
    )


class Pixels(torch.nn.Module):
    """A backbone whose features are the pixels."""

    has_class_token = True

    def features(self, images):
        return [(images.flatten(1)[:, None], images.permute(0, 2, 3, 1))]


def test_online_k_nn_never_votes_with_the_queries_themselves():
    """Every image has a label of its own: whoever finds it right has found the image itself."""
    watch = monitor.OnlineKnn(
        images_of(torch.arange(100)), small_recipe("mae", "data.img_size=[4,4]"), torch.device("cpu")
    )
    found = watch(Pixels())
    assert found["knn"] == found["knn_cls"] == 0.0
    assert watch.is_query.sum() == 20 and len(watch.chosen) == len(set(watch.chosen.tolist())) == 100


def test_online_k_nn_finds_the_copies_of_a_query_in_its_bank():
    """Of ten images fifty copies each: all of the 20 nearest are copies of the query."""
    images = images_of(torch.arange(500) % 10)
    images.images = images.images[:10].repeat(50, 1, 1, 1)
    watch = monitor.OnlineKnn(images, small_recipe("mae", "data.img_size=[4,4]"), torch.device("cpu"))
    assert watch(Pixels())["knn_cls"] == 1.0


def test_online_k_nn_leaves_every_part_of_the_backbone_in_its_mode():
    """A DINO teacher is in eval mode, and its batch norms are not."""
    shape = [
        *SMALL["dino"],
        "backbone.name=cvt",
        *(f"backbone.{key}=null" for key in ("embed_dim", "depth", "num_heads")),
    ]
    objective = small_objective("dino", *shape).train()
    modes = {name: part.training for name, part in objective.named_modules()}
    assert not modes["teacher"] and any(mode for name, mode in modes.items() if name.startswith("teacher."))
    recipe = small_recipe("dino", "data.img_size=[16,16]")
    images = images_of(torch.arange(20) % 2)
    images.images = images.images.expand(-1, 3, -1, -1)
    monitor.OnlineKnn(images, recipe, torch.device("cpu"))(objective.exported)
    assert {name: part.training for name, part in objective.named_modules()} == modes


def test_speed_seconds_and_budget_as_a_clock_tells_them(tmp_path, monkeypatch):
    """Half a second a step of 32 images, a tenth of it waiting; k-NN trials of a minute count for neither speed nor
    seconds, also where no line is due."""
    clock = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])
    told = []
    accelerator = SimpleNamespace(
        is_main_process=True,
        num_processes=1,
        device=torch.device("cpu"),
        trackers=[SimpleNamespace(log=lambda values, step: told.append((step, values)))],
    )
    recipe = small_recipe("mae", "train.batch_size=32", "monitor.log_every=4")
    watch = monitor.Monitor(
        accelerator, checkpoint.Run(tmp_path), recipe, small_objective("mae"), total=10, done=0, flops_per_image=7.0
    )
    for step in range(10):
        with watch.waiting():
            clock[0] += 0.05
        clock[0] += 0.45
        watch.step(step, dict(loss=torch.tensor(float(step)), accuracy=torch.tensor(0.5)), lr=0.1 * step)
        if step in (3, 5):
            with watch.paused():
                clock[0] += 60.0
            watch.knn(step + 1, dict(knn=0.5))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    groups = [
        *("train/loss", "train/accuracy", "optim/lr", "speed/images_per_second", "speed/flops_per_second"),
        *("speed/data_wait", "progress/images", "progress/flops", "progress/seconds"),
    ]
    assert [step for step, _ in told] == [4, 4, 6, 8, 10]
    assert [set(values) for _, values in told if "online/knn" not in values] == [set(groups)] * 3
    told = [line for line in lines if "loss" in line]
    assert [line["step"] for line in told] == [4, 8, 10]
    assert [line["data_wait"] for line in told] == pytest.approx([0.1] * 3)
    assert [line["flops_per_second"] for line in told] == [7 * 64] * 3
    assert [line["images_per_second"] for line in told] == pytest.approx([64.0] * 3)
    assert [line["seconds"] for line in told] == pytest.approx([2.0, 4.0, 5.0])
    assert [line["images"] for line in told] == [128, 256, 320]
    assert [line["flops"] for line in told] == pytest.approx([7 * 128, 7 * 256, 7 * 320])
    assert [line["loss"] for line in told] == pytest.approx([1.5, 5.5, 8.5])  # means over the steps since the last line
    assert [line["lr"] for line in told] == pytest.approx([0.3, 0.7, 0.9])
    assert [line["step"] for line in lines if "knn" in line] == [4, 6]


def test_all_trackers_get_the_run_s_name_and_settings(tmp_path):
    """As accelerate would open them: what it is given, and what is said to those it opens. A resumed run has the record
    that it began, and one that starts anew in its place another."""
    opened, said = {}, {}

    class Tracker:
        def __init__(self, name):
            self.name = name
            self.writer = SimpleNamespace(name="ssl_vit", set_name=lambda value: setattr(self.writer, "name", value))

        def store_init_configuration(self, values):
            said[self.name] = values

    accelerator = SimpleNamespace(
        is_main_process=True,
        trackers=[Tracker(name) for name in ("wandb", "comet_ml", "aim")],
        init_trackers=lambda project, init_kwargs: opened.update(init_kwargs, project=project),
    )
    settings = dict(train=dict(steps=3, flops=None), optim=dict(betas=[0.9, 0.95]), data=dict(hflip=True))
    settings |= dict(recipe="mae", images=dict(count=7, classes=["a"] * 1000))
    path = tmp_path / "mae-digits-s0"
    path.mkdir()
    monitor.start_trackers(accelerator, path, settings, 0)
    assert opened["tensorboard"] == dict(purge_step=0)  # what a process that was killed early left
    record = opened["wandb"]["id"]
    assert re.fullmatch(r"mae-digits-s0-[0-9a-f]{8}", record) and opened["trackio"]["name"] == record
    monitor.start_trackers(accelerator, path, settings, 7)
    assert opened["wandb"]["id"] == record and opened["tensorboard"] == dict(purge_step=8)
    (path / "tracker-id.txt").unlink()
    monitor.start_trackers(accelerator, path, settings, 0)
    assert opened["wandb"]["id"] != record
    names = "wandb name, swanlab experiment_name, mlflow run_name, clearml task_name".split(", ")
    assert {opened[tracker][key] for tracker, key in map(str.split, names)} == {"mae-digits-s0"}
    assert opened["project"] == "ssl_vit" and Path(opened["dvclive"]["dir"]).parent.name == "mae-digits-s0"
    assert [tracker.writer.name for tracker in accelerator.trackers] == ["ssl_vit", "mae-digits-s0", "mae-digits-s0"]
    config = {"train.steps": 3, "optim.betas": "[0.9, 0.95]", "data.hflip": True, "recipe": "mae", "images.count": 7}
    assert said == dict.fromkeys(("wandb", "comet_ml", "aim"), config) and opened["trackio"]["config"] == config


def test_trackers_get_the_pictures_each_in_its_own_form(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "reconstruction.png")
    got = {}

    class Tracker:
        def __init__(self, name):
            self.name = name

        def log_images(self, values, step, **more):
            got[self.name] = values["pictures/reconstruction"], step, more

    names = ["tensorboard", "wandb", "swanlab", "aim", "clearml", "dvclive"]
    accelerator = SimpleNamespace(trackers=[Tracker(name) for name in names])
    watch = SimpleNamespace(accelerator=accelerator)
    watch.track = functools.partial(monitor.Monitor.track, watch)
    monitor.Monitor.pictures(watch, 9, [tmp_path / "reconstruction.png"])
    assert got.keys() == set(names) - {"dvclive"}  # which takes none through accelerate
    assert got["tensorboard"][0].shape == (1, 5, 7, 3) and got["tensorboard"][1:] == (9, dict(dataformats="NHWC"))
    for name in ("wandb", "swanlab"):
        [page], step, more = got[name]
        assert np.array_equal(page, pixels) and (step, more) == (9, {})
    assert all(np.array_equal(got[name][0], pixels) for name in ("aim", "clearml"))


def test_the_effective_rank_is_that_of_rankme():
    """exp of the entropy of singular values (arXiv 2210.02885, equation 1), here 4, 2, 1 and 1 of centred features."""
    values = np.array([4.0, 2.0, 1.0, 1.0])
    rng = np.random.default_rng(0)
    left = np.linalg.qr(np.c_[np.ones(50), rng.normal(size=(50, 4))])[0][:, 1:]  # at right angles to a constant
    right = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    p = values / 8
    expected = np.exp(-(p * np.log(p)).sum())
    assert monitor.effective_rank(left * values @ right + 3.0) == pytest.approx(expected, rel=1e-6)
