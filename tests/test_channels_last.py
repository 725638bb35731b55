"""Convolutional backbones with channels last: the same results but for rounding, the same files."""

import shutil

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from conftest import FACTS, make_batch, small_objective, small_recipe
from safetensors.torch import load_file
from test_kinds import KINDS
from test_loop import TINY, log_of
from test_recomputation import passes

from ssl_vit import channels_last, checkpoint, engine, objectives, optim, pretrain, weights
from ssl_vit.errors import UserError

ON = "runtime.channels_last=true"
SUITED = {"resnet": "gaussian", "convnext": "dino", "cvt": "simmim"}


def laid(module: torch.nn.Module) -> list[torch.Tensor]:
    """The weights that do not lie in the usual order."""
    return [weight for weight in module.parameters() if not weight.is_contiguous()]


def prepared(kind: str, *settings: str, lr: float = 1e-3):
    recipe = small_recipe(SUITED[kind], *KINDS[kind], *settings)
    objective = small_objective(SUITED[kind], *KINDS[kind])
    return engine.Engine(Accelerator(cpu=True), recipe, objective), optim.build(objective, recipe.optim, lr)


def train(devices: engine.Engine, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses, objective = [], devices.objective
    for step in steps:
        optimizer.zero_grad()
        objective.begin_step()
        loss = devices.model(make_batch(objective, torch.arange(8), step))["loss"]
        loss.backward()
        optimizer.step()
        objective.on_optimizer_step(step, 10, devices.sum)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", SUITED)
def test_losses_gradients_and_features_are_the_same_but_for_rounding(kind):
    plain, other = (small_objective(SUITED[kind], *KINDS[kind]) for _ in range(2))
    channels_last.convert(other)
    assert laid(other) and not laid(plain) and plain.state_dict().keys() == other.state_dict().keys()
    seen = []
    [first, *_] = channels_last.convolutional(other)
    convolutions = [part for part in first.modules() if isinstance(part, torch.nn.Conv2d)]
    convolutions[-1].register_forward_hook(lambda _, given, made: seen.append(made))
    (loss, gradients, _), (found, ours, _) = passes(plain), passes(other)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)  # they hand it on, layer by layer
    assert found == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == ours.keys()
    for key, value in gradients.items():
        assert (ours[key] - value).norm() <= 1e-3 * value.norm() + 1e-6, key
    images = torch.rand(2, 3, *plain.exported.input_size)
    with torch.no_grad():
        [expected], [had] = (objective.eval().exported.features(images) for objective in (plain, other))
    for a, b in zip(expected, had, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SUITED)
def test_a_run_goes_on_bit_for_bit_and_with_or_without_it(kind, tmp_path):
    devices, optimizer = prepared(kind, ON)
    assert laid(devices.objective)
    losses = train(devices, optimizer, range(2))
    run = checkpoint.Run(tmp_path)
    devices.save(run, 2, optimizer)
    losses += train(devices, optimizer, range(2, 4))
    [path] = run.checkpoints().values()
    for settings in ([ON], []):
        again, fresh = prepared(kind, *settings)
        again.load(path, fresh)
        assert bool(laid(again.objective)) is bool(settings)
        for weight, moments in fresh.state.items():  # fused kernels want them alike
            assert {value.stride() for value in moments.values() if value.ndim} == {weight.stride()}
        found = train(again, fresh, range(2, 4))
        assert found == (losses[2:] if settings else pytest.approx(losses[2:], rel=1e-4))
        if settings:
            for (name, ours), theirs in zip(
                again.objective.state_dict().items(), devices.objective.state_dict().values(), strict=True
            ):
                assert torch.equal(ours, theirs), name


def test_whole_runs_have_the_same_losses_and_write_weights_in_timm_s_order(tmp_path):
    settings = [*TINY[3:], *KINDS["resnet"], *FACTS, "data.img_size=8", "data.in_chans=1", "train.steps=3"]
    settings += ["data.mean=[0.5]", "data.std=[0.25]", "objective.decoder_depth=1", "objective.decoder_embed_dim=16"]
    for name, more in dict(plain=[], last=[ON]).items():
        recipe = objectives.read_recipe("gaussian", [*settings, "objective.decoder_num_heads=2", *more], None)
        assert pretrain.pretrain(recipe, tmp_path / name) == 0
    plain, last = ([line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("plain", "last"))
    assert len(plain) == 3 and last[0] == pytest.approx(plain[0], rel=1e-5) and last == pytest.approx(plain, rel=1e-4)
    written = load_file(tmp_path / "last/backbone/model.safetensors")
    model = timm.create_model(f"local-dir:{tmp_path / 'last/backbone'}", pretrained=True)
    for name, weight in model.state_dict().items():
        assert written[name].is_contiguous() and weight.is_contiguous() and torch.equal(written[name], weight), name
    assert not laid(weights.load(str(tmp_path / "last")))
    assert yaml.safe_load((tmp_path / "last/recipe.yaml").read_text())["runtime"]["channels_last"] is True
    shutil.rmtree(tmp_path / "plain/backbone")  # as if it had not been finished: it goes on with the other setting
    recipe = objectives.read_recipe("gaussian", [*settings, "objective.decoder_num_heads=2", ON], None)
    assert pretrain.pretrain(recipe, tmp_path / "plain") == 0


@pytest.mark.parametrize(
    ("kind", "device", "sharded", "expected"),
    [
        *((kind, "cuda", False, True) for kind in SUITED),
        ("resnet", "cpu", False, False),
        ("resnet", "cuda", True, False),
        *((kind, "cuda", False, False) for kind in ("vit", "swin", "hybrid", "timm's hybrid", "bit")),
    ],
)
def test_by_itself_it_is_used_on_gpus_where_it_suits(kind, device, sharded, expected):
    objective = small_objective("gaussian", *KINDS[kind])
    runtime = small_recipe("gaussian").runtime
    assert channels_last.wanted(runtime, torch.device(device), objective, sharded) is expected
    runtime.channels_last = False
    assert not channels_last.wanted(runtime, torch.device(device), objective, sharded)
    runtime.channels_last = True
    if channels_last.unsuited(objective, sharded):
        with pytest.raises(UserError, match=r"channels_last=true does not suit this run: .*\. Leave it at auto"):
            channels_last.wanted(runtime, torch.device(device), objective, sharded)
    else:
        assert channels_last.wanted(runtime, torch.device(device), objective, sharded)
