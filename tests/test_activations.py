"""What autograd keeps, and how many images at a time a CPU takes because of it."""

import re

import pytest
import torch
from conftest import small_objective, small_recipe
from safetensors.torch import load_file
from test_loop import arguments, run

from ssl_vit import activations, engine
from ssl_vit.objectives.reconstruct import Reconstruct


class Tiny(torch.nn.Module):
    """Layers on the four pixels of an image, times the norm of their first weights."""

    labelled, micro_batch_multiple = False, 3

    def __init__(self, *layers, normed=False):
        super().__init__()
        self.views = {"image": type("View", (), dict(count=None, size=(2, 2)))}
        self.layers, self.normed = torch.nn.Sequential(*layers), normed

    def forward(self, batch):
        values = self.layers(batch.views["image"].flatten(1)).sum()
        return dict(loss=values + (self.layers[0].weight.sin().cos().sum() if self.normed else 0))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_are_counted_once_and_weights_never(device):
    """Two linear layers and a GELU keep their inputs: 4 + 8 + 8 values an image. What is computed from weights is kept
    once, however many images there are: here the sines of 8 x 4."""
    layers = torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1)
    assert activations.measure(Tiny(*layers).to(device), 1) == (0, 4 * (4 + 8 + 8), 4 * 8)
    assert activations.measure(Tiny(*layers, normed=True).to(device), 1) == (4 * 8 * 4, 4 * (4 + 8 + 8), 4 * 8)


def test_a_loss_may_keep_a_tensor_for_each_row_or_none():
    """As many as there are rows: their number differs between the batches that are compared."""

    class Looping(Tiny):
        def forward(self, batch):
            values = self.layers(batch.views["image"].flatten(1))
            return dict(loss=torch.stack([row.exp().sum() for row in values]).mean())

    kept = activations.measure(Looping(torch.nn.Linear(4, 8)), 1)
    assert kept == (0, 4 * (4 + 8), 4 * 4)  # the input is one tensor, and the exponentials one of each row
    assert activations.at_a_time(activations.Kept(0, 0, 0)) >= 2**20


def test_a_block_that_recomputes_keeps_its_input_and_the_largest_is_there_once():
    blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(3)]
    tiny = Tiny(*blocks, torch.nn.Linear(4, 1)).to("meta")
    assert activations.measure(tiny, 1).each == 4 * (3 * (4 + 4) + 4)
    assert activations.measure(tiny, 1, blocks).each == 4 * (3 * 4 + 4 + (4 + 4))


def test_a_cpu_takes_as_many_images_as_keep_its_largest_tensor_below_32_mb():
    """The hidden layer of MAE's decoder: 64 + 1 tokens of 64 values."""
    mae, cpu = small_objective("mae"), torch.device("cpu")
    assert engine.images_at_a_time(small_recipe("mae"), cpu, mae) == 2**25 // (65 * 64 * 4)
    assert engine.images_at_a_time(small_recipe("mae"), torch.device("cuda"), mae) is None
    assert all(torch.equal(a, b) for a, b in zip(mae.buffers(), small_objective("mae").buffers(), strict=True))
    whole = small_objective("dino", "objective.use_bn_in_head=true")
    assert engine.images_at_a_time(small_recipe("dino"), cpu, whole) is None


def test_a_step_is_cut_evenly_into_what_a_cpu_takes_and_only_rounding_differs(tmp_path, monkeypatch):
    forward = Reconstruct.forward

    def counted(self, batch):
        print("rows:", len(batch.draw.rows))
        return forward(self, batch)

    run(tmp_path, *arguments("mae", "--output", str(tmp_path / "whole")))
    monkeypatch.setattr(Reconstruct, "forward", counted)
    monkeypatch.setattr(activations, "at_a_time", lambda kept: 13)  # of 32
    cut = run(tmp_path, *arguments("mae", "--output", str(tmp_path / "cut")))
    assert re.findall(r"rows: (\d+)", cut.said)[-6:] == ["11", "11", "10"] * 2
    a, b = (load_file(tmp_path / name / "backbone/model.safetensors") for name in ("whole", "cut"))
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, rtol=0, atol=2e-4)
