"""BatchNorm over processes: the statistics, losses and gradients of one process that has all the rows."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_batch, small_objective, small_recipe
from several import Several
from test_engine import started
from test_loop import arguments, log_of, run
from timm.layers import BatchNormAct2d
from torch import nn
from torch.distributed.tensor import DTensor

from ssl_vit import batch_norm, engine, optim
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Objective

TIED = {
    "dino": ["objective.use_bn_in_head=true"],
    "supervised": [
        "backbone.name=resnet10t",
        "backbone.drop_path_rate=0",
        *(f"backbone.{key}=null" for key in ("embed_dim", "depth", "num_heads")),
    ],
}
LAYERS = [
    nn.BatchNorm1d(5),
    nn.BatchNorm1d(5, track_running_stats=False),
    nn.BatchNorm2d(5, momentum=None, affine=False),
    BatchNormAct2d(5),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_normalises_its_rows_by_the_statistics_of_all(layer, training):
    shape = (5,) if isinstance(layer, nn.BatchNorm1d) else (5, 3, 2)
    x = 1000 + torch.randn(8, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = nn.Sequential(copy.deepcopy(layer)).train(training).double()
    own = copy.deepcopy(reference)
    [able] = batch_norm.shareable(own)
    var, mean = torch.var_mean(x[4:], [d for d in range(x.ndim) if d != 1], correction=0)  # of another process
    expected = reference(x)
    with batch_norm.shared([able], lambda mine: torch.stack([mine, torch.stack([mean, var])])):
        found = own(x[:4])
    torch.testing.assert_close(found, expected[:4])
    assert own.state_dict().keys() == reference.state_dict().keys()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(own.state_dict()[key], value)
    torch.testing.assert_close(own(x[:4]), reference(x[:4]))  # outside of the block it has its own rows


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="0 is a BatchNorm3d, whose statistics"):
        batch_norm.shareable(nn.Sequential(nn.BatchNorm3d(2)))


class Taught(Objective):
    """A student with a teacher whose BatchNorm is of a kind that cannot be shared."""

    def __init__(self, trained: bool):
        nn.Module.__init__(self)
        self.backbone = SimpleNamespace(model=nn.Linear(2, 2))
        self.student = nn.Sequential(nn.Linear(2, 2), *[nn.BatchNorm1d(2)] * trained)
        self.teacher = nn.Sequential(nn.BatchNorm3d(2)).requires_grad_(False)


def test_a_frozen_teacher_s_statistics_do_not_depend_on_the_batch():
    """Its student may take micro-batches, whatever the teacher is made of."""
    free, tied = Taught(trained=False), Taught(trained=True)
    assert free.batch_statistics is None and batch_norm.shareable(free) == []
    assert tied.batch_statistics == "BatchNorm in Linear" and len(batch_norm.shareable(tied)) == 1
    for mode in (True, False):
        assert free.train(mode).batch_statistics is None
        assert (free.training, free.student.training, free.teacher.training) == (mode, mode, False)


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_a_look_for_batch_norm_leaves_a_frozen_backbone_in_eval_mode(name):
    """A step that is repeated with fewer images at a time looks for it, and must be the same step."""
    objective = small_objective(name)
    optim.freeze(objective, 0, 10)
    before = [part.training for part in objective.modules()]
    assert set(before) == {True, False}
    batch_norm.of_batches(objective)
    assert [part.training for part in objective.modules()] == before


def test_an_ema_teacher_normalises_by_its_batches():
    objective = small_objective("dino", "objective.use_bn_in_head=true")
    names = list(batch_norm.of_batches(objective))
    assert any("teacher" in name for name in names) and any("teacher" not in name for name in names)


def step() -> int:
    """One step of 16 rows in float64, shared by the processes; what comes of it goes to a file."""
    name, kind, folder = sys.argv[1:]
    recipe = small_recipe(name, f"runtime.engine={kind}", *TIED[name])
    devices = engine.Engine(Accelerator(cpu=True), recipe, small_objective(name, *TIED[name]).double())
    rows = torch.arange(16).chunk(devices.processes)[devices.index]
    objective = devices.objective
    with devices.micro_batch(last=True):
        loss = devices.model(make_batch(objective, rows, dtype=torch.float64))["loss"]
        loss.backward()
    objective.on_optimizer_step(3, 10, devices.sum)
    found = dict(objective.state_dict(), loss=devices.sum(loss.detach()) / devices.processes)
    found |= {f"gradient of {key}": p.grad for key, p in objective.named_parameters() if p.grad is not None}
    found = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}
    if devices.first:
        torch.save(found, Path(folder, f"{kind}-{devices.processes}.pt"))
    return 0


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("dino", "ddp", 2),
        pytest.param("dino", "fsdp2", 4, marks=pytest.mark.matrix),
        pytest.param("supervised", "ddp", 4, marks=pytest.mark.matrix),
        pytest.param("supervised", "fsdp2", 2, marks=pytest.mark.matrix),
    ],
)
def test_a_step_of_several_processes_equals_that_of_one(name, kind, count, tmp_path, alone):
    for processes in (1, count):
        several = Several(step, tmp_path, name, kind, str(tmp_path), count=processes)
        assert several.wait() == [0] * processes, several.said
    one, many = (torch.load(tmp_path / f"{kind}-{processes}.pt") for processes in (1, count))
    assert one.keys() == many.keys() and any(key.startswith("gradient of") for key in one)
    for key, value in one.items():
        torch.testing.assert_close(many[key], value, rtol=1e-5, atol=1e-7, msg=lambda m, key=key: f"{key} {m}")


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_with_batch_norm_equals_one_process(kind, tmp_path, alone):
    tied = "objective.use_bn_in_head=true"
    run(tmp_path, *arguments("dino", tied, "--output", "one"))
    several = started(tmp_path, "dino", kind, tied, "train.steps=12", "monitor.knn_every=0", "--output", "several")
    assert several.wait() == [0, 0], several.said
    one, many = ([line["loss"] for line in log_of(tmp_path / folder)] for folder in ("one", "several"))
    assert len(one) == 12 and many == pytest.approx(one, rel=1e-5)
    cut = started(tmp_path, "dino", kind, tied, "runtime.per_device_batch_size=4", "--output", "cut")
    assert cut.wait() == [2, 2] and cut.said.count("error:") == 1
    assert "needs a process's whole share of 16 images at once, and the device has 4 at a time" in cut.said
