"""What a run says of itself while it trains: its speed, and k-NN on images that are not among the neighbours."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import small_objective, small_recipe

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


def test_speed_seconds_and_budget_as_a_clock_tells_them(tmp_path, monkeypatch):
    """Half a second a step of 32 images; a k-NN trial of a minute counts for neither speed nor seconds."""
    clock = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=1, device=torch.device("cpu"), log=lambda values, step: None
    )
    recipe = small_recipe("mae", "train.batch_size=32", "monitor.log_every=4")
    watch = monitor.Monitor(
        accelerator, checkpoint.Run(tmp_path), recipe, small_objective("mae"), total=10, done=0, flops_per_image=7.0
    )
    for step in range(10):
        clock[0] += 0.5
        watch.step(step, dict(loss=torch.tensor(float(step))), lr=0.1 * step)
        if step == 3:
            clock[0] += 60.0
            watch.knn(4, dict(knn=0.5))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [line for line in lines if "loss" in line]
    assert [line["step"] for line in told] == [4, 8, 10]
    assert [line["images_per_second"] for line in told] == pytest.approx([64.0] * 3)
    assert [line["seconds"] for line in told] == pytest.approx([2.0, 4.0, 5.0])
    assert [line["images"] for line in told] == [128, 256, 320]
    assert [line["flops"] for line in told] == pytest.approx([7 * 128, 7 * 256, 7 * 320])
    assert [line["loss"] for line in told] == pytest.approx([1.5, 5.5, 8.5])  # means over the steps since the last line
    assert [line["lr"] for line in told] == pytest.approx([0.3, 0.7, 0.9])
    assert [line["knn"] for line in lines if "knn" in line] == [0.5]
