"""What a run says before its first step, and of the time that is left: the right figures, and only where they apply."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_objective, small_recipe

from ssl_vit import backbones, monitor, overview
from ssl_vit import recipe as recipes


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "a second"),
        (119.4, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (9000, "2.5 hours"),
        (86400, "24 hours"),
        (2.25 * 86400, "2.2 days"),
        (5000 * 86400, "5,000 days"),
    ],
)
def test_durations(seconds, words):
    assert overview.duration(seconds) == words


def advice(capsys, *settings: str, count: int = 5000, labels: bool = True, device: str = "cpu", **more) -> list[str]:
    recipe = small_recipe("mae", "train.steps=100", "train.batch_size=64", *settings)
    recipe.data.img_size = [recipe.data.img_size] * 2 if isinstance(recipe.data.img_size, int) else recipe.data.img_size
    recipe.data.name = "my photos"
    vars(recipe).update(more)
    images = torch.empty(count, 0)
    images.labels = torch.zeros(count) if labels else None
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=2, autocast=nullcontext)
    overview.advise(recipe, Path("runs/a"), images, None, accelerator)
    return capsys.readouterr().out.splitlines()


def test_advice_where_it_applies(capsys, monkeypatch):
    assert advice(capsys) == advice(capsys, count=1437) == advice(capsys, "data.img_size=64") == []  # 16 px; 64 px
    assert advice(capsys, "data.img_size=224", device="cuda") == []

    [few] = advice(capsys, "data.img_size=64", count=1999)
    assert "1,999 images are few" in few
    assert few.endswith("eval/finetune.py --backbone vit_small_patch16_224.dino --data 'my photos'")
    [few, unlabelled] = advice(capsys, "data.img_size=64", count=1999, labels=False)
    assert few.endswith("start: --init-from vit_small_patch16_224.dino")
    assert "no labels" in unlabelled and "runs/a/pictures" in unlabelled and "knn.py --backbone runs/a" in unlabelled
    assert advice(capsys, "data.img_size=64", "backbone.init_from=runs/b", count=1999) == []

    [slow] = advice(capsys, "data.img_size=[32,96]")
    assert "32x96 px are slow on a CPU" in slow
    assert "smaller images (data.img_size=64)" in slow
    [slow] = advice(capsys, "data.img_size=224", name="dino-photos")
    assert "(--recipe dino data.img_size=64)" in slow


@pytest.mark.parametrize(("flops_per_image", "rows"), [(1e6, 32), (3e9, 10), (1e11, 0)])
def test_the_time_is_foretold_from_a_pass_of_a_second(capsys, monkeypatch, flops_per_image, rows):
    """100 steps of 64 images on two processes: a process's images of a step, fewer if each costs much."""
    objective = small_objective("dino")

    def measured(*arguments):
        assert arguments == (objective, 3, accelerator, rows)
        return 0.5

    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    recipe = small_recipe("dino", "train.steps=100", "train.batch_size=64")
    monkeypatch.setattr(overview, "seconds_per_image", measured)
    overview.foresee(recipe, objective, accelerator, flops_per_image)
    said = capsys.readouterr().out
    assert said == "About 27 min if loading images takes no time: forward and backward need 0.5 s an image.\n"


@pytest.mark.parametrize(("name", "rows", "measured"), [("dino", 7, 7), ("dino", 1, 2), ("supervised", 7, 6)])
def test_the_time_of_an_image_is_measured_on_a_copy(monkeypatch, name, rows, measured):
    """The first pass is slower than the second, by a made-up clock; the objective is as it was."""
    objective = small_objective(name, *(["objective.mixup=0.8"] if name == "supervised" else []))
    clock, costs = [0.0], iter([9.0, 3.0])
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    forward = type(objective).forward

    def slow(self, batch):
        assert self is not objective and self.training and len(batch.draw.rows) == measured
        clock[0] += next(costs)
        return forward(self, batch)

    accelerator = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    monkeypatch.setattr(type(objective), "forward", slow)
    monkeypatch.setattr(overview.time, "perf_counter", lambda: clock[0])
    assert overview.seconds_per_image(objective, 3, accelerator, rows) == 3.0 / measured
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert all(parameter.grad is None for parameter in objective.parameters())


def said(estimate: monitor.Estimate, seconds: dict[int, float]) -> tuple[list[tuple[int, str]], int]:
    """(what is said after which step, how often the device was waited for), of steps that take so long."""
    now, waits, texts = 1000.0, [], []

    def settle():
        waits.append(now)
        return now

    for at, took in seconds.items():
        now += took
        if text := estimate.step(at, now, settle):
            texts.append((at, text))
    return texts, len(waits)


def test_the_time_left_is_of_steps_that_had_nothing_prepared():
    """A run that goes on from step 100: a slow start, four steps whose images two workers have ready, then 2 s each."""
    steps = {101: 50.0} | {at: 0.1 for at in range(102, 106)} | {at: 2.0 for at in range(106, 1001)}
    text = "About 30 min to go: 890 steps of 2 s, measured over steps 106 to 110."
    assert said(monitor.Estimate(100, 1000, ahead=4), steps) == ([(110, text)], 3)


def test_the_time_left_of_slow_steps_is_said_early():
    steps = {1: 90.0} | {at: 20.0 for at in range(2, 101)}
    text = "About 32 min to go: 97 steps of 20 s, measured over steps 2 to 3."
    assert said(monitor.Estimate(0, 100, ahead=32), steps) == ([(3, text)], 2)


def test_a_run_that_is_soon_done_says_no_time_left():
    assert said(monitor.Estimate(0, 5, ahead=0), {at: 1.0 for at in range(1, 6)})[0] == []
    assert said(monitor.Estimate(0, 6, ahead=0), {at: 1.0 for at in range(1, 7)})[0] == []  # nothing is left
    [(at, _)], _ = said(monitor.Estimate(0, 7, ahead=0), {at: 1.0 for at in range(1, 8)})
    assert at == 6


def test_a_hybrid_goes_by_its_name():
    config = recipes.Backbone(name="vit_tiny_r_s16_p8_224", patch_size=2)
    data = recipes.Data(img_size=[64, 64], in_chans=3, mean=[0.5] * 3, std=[0.5] * 3)
    hybrid = backbones.build(config, data, seed=0)
    assert overview.shape_of(hybrid, config).startswith("vit_tiny_r_s16_p8_224: ViT, 192 wide, 12 deep, patch 32, ")
