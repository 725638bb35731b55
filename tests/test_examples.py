"""docs/examples: each runs, learns, and computes the recipe's own loss and gradients; so does the README's Python."""

import importlib.util
import math
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
import torch.nn.functional as F
from conftest import make_batch, small_objective
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from test_docs import FENCE, ROOT

from ssl_vit import backbones

FOLDER = ROOT / "docs" / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
STEPS = 20


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_an_example_of_every_objective():
    assert NAMES == ["beit", "dino", "gaussian", "mae", "masked_patch", "simmim", "supervised"]
    table = (FOLDER / "README.md").read_text()
    for name in NAMES:
        text = (FOLDER / f"{name}.py").read_text()
        paper = re.search(r"\d{4}\.\d{5}", text)[0]
        assert f"python docs/examples/{name}.py" in text and f"recipes/{name.replace('_', '-')}.yaml" in text
        assert re.search(rf"^\| \[{name}\.py\]\({name}\.py\) \|.*{paper}", table, re.MULTILINE), name


def fewer_digits():
    digits = load_digits()
    return Bunch(images=digits.images[:720], target=digits.target[:720])


@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns(name, monkeypatch, capsys):
    monkeypatch.setattr(sklearn.datasets, "load_digits", fewer_digits)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", str(STEPS)])
    with torch.random.fork_rng():
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+?),?(?: |$)", said, re.MULTILINE)]
    assert len(losses) == STEPS // 10 and np.isfinite(losses).all()
    before, after = (float(found) / 100 for found in re.findall(r"^k-NN .*: ([\d.]+)%$", said, re.MULTILINE))
    assert before > 0.3 and after > 0.25  # of ten digits
    if name == "dino":  # whose loss follows its teacher, up and down
        assert losses[-1] < 1.2 * math.log(128)
        assert 0.02 < float(said.split("teacher_entropy ")[-1].split()[0]) / math.log(128) < 0.98
    else:
        assert losses[-1] < losses[0]


def test_an_example_is_a_script(tmp_path):
    """In a process of its own, from another folder."""
    command = [sys.executable, str(FOLDER / "supervised.py"), "--steps", "2"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert re.search(r"^step 2: loss 2\.\d+$", found.stdout, re.MULTILINE)


# -- the same loss as the recipe's ------------------------------------------------------------------------------------


SHAPE = dict(img_size=16, patch_size=2, in_chans=3, embed_dim=16, depth=2, num_heads=2, num_classes=0)


def vit(sincos=False, **more):
    """The backbone of `small_objective`, without what the project lays around it."""
    model = timm.create_model("vit_tiny_patch16_224", **SHAPE | more)
    if sincos:
        backbones.fix_sincos_positions(model)
    return model


@pytest.mark.parametrize("more", [
    dict(reg_tokens=4), dict(pre_norm=True), dict(class_token=False, global_pool="avg"), dict(no_embed_class=True),
    dict(dynamic_img_size=True),
])  # fmt: skip
@pytest.mark.parametrize("name, model", [
    ("mae", "MAE"), ("beit", "BEiT"), ("simmim", "SimMIM"), ("gaussian", "Denoiser"), ("masked_patch", "MaskedPatch"),
])  # fmt: skip
def test_a_vit_of_other_tokens_is_refused_and_learnt_positions_stay(name, model, more):
    make, own = getattr(load(name), model), [torch.zeros(3), torch.ones(3)] if name == "masked_patch" else []
    with pytest.raises(ValueError, match="must have a class token with a position, no registers, no norm_pre, and im"):
        make(vit(**more), *own)
    learnt = vit()
    before = learnt.pos_embed.clone()
    make(learnt, *own)
    assert torch.equal(learnt.pos_embed, before) and learnt.pos_embed.requires_grad


def names(objective, **parts):
    """{parameter or buffer of the objective: its name in an example}; parts: by what prefixes are replaced."""
    parts = {"backbone.model": "vit", "teacher.model": "teacher"} | parts
    found = {}
    for name in objective.state_dict():
        old = next((old for old in parts if name.startswith(f"{old}.")), None)
        found[name] = name if old is None else parts[old] + name[len(old) :]
    return found


def copy_weights(objective, model, **parts):
    """Make all weights random, so that no bias, norm or token is trivially equal, and the same in both."""
    positions = objective.backbone.model.pos_embed
    if not positions.requires_grad:  # sine-cosine ones, the same from the start
        assert torch.equal(model.vit.pos_embed, positions)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in objective.parameters():
            weight.copy_(weight + 0.1 * torch.randn(weight.shape, generator=generator))
    renamed, state = names(objective, **parts), objective.state_dict()
    model.load_state_dict({renamed[name]: value for name, value in state.items()})  # strictly: no weight is left out
    return renamed


def compare(objective, loss, expected, model, renamed):
    """Losses agree to 1e-6 and gradients to rounding."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    ours, theirs = dict(objective.named_parameters()), dict(model.named_parameters())
    compared = 0
    for name, weight in ours.items():
        mine, found = weight.grad, theirs[renamed[name]].grad
        assert (mine is None) == (found is None), name
        if mine is not None:
            compared += 1
            torch.testing.assert_close(found, mine, rtol=1e-4, atol=5e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert compared > 20


def batch_of(objective):
    batch = make_batch(objective, torch.arange(8))
    return batch, {name: objective.backbone.normalise(view) for name, view in batch.views.items()}


@pytest.mark.parametrize("name", ["mae", "gaussian"])
def test_with_a_decoder(name):
    objective, example = small_objective(name), load(name)
    model = {"mae": "MAE", "gaussian": "Denoiser"}[name]
    model = getattr(example, model)(vit(sincos=True), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    renamed = copy_weights(objective, model)
    batch, views = batch_of(objective)
    if name == "mae":
        loss = model.loss(views["image"], batch.draw.uniform("mask", 64))
    else:
        normal, u = batch.draw.normal("noise", 3, 16, 16), batch.draw.uniform("noise level", 1, 1, 1)
        loss = model.loss(views["image"], normal, u)
    compare(objective, loss, objective(batch)["loss"], model, renamed)


@pytest.mark.parametrize("name", ["simmim", "beit", "masked-patch"])
def test_with_a_linear_head(name):
    objective, example = small_objective(name), load(name.replace("-", "_"))
    batch, views = batch_of(objective)
    noise = (batch.draw.uniform("mask", 64),)
    if name == "simmim":
        model = example.SimMIM(vit(sincos=True))
    elif name == "beit":
        model, noise = example.BEiT(vit(), vocab_size=8), (batch.draw.uniform("block mask", 16, 4, 4), *noise)
    else:
        model = example.MaskedPatch(vit(), objective.backbone.mean.flatten(), objective.backbone.std.flatten())
    renamed = copy_weights(objective, model, decoder="head", target="tokenizer")
    loss = model.loss(views["image"], *noise)
    compare(objective, loss, objective(batch)["loss"], model, renamed)


def test_beit_finds_the_tokens_of_the_recipe():
    objective, model = small_objective("beit"), load("beit").BEiT(vit(), vocab_size=8)
    images = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))  # on which the objective is fitted
    model.tokenizer.fit(objective.backbone.normalise(images), 0)
    assert torch.equal(model.tokenizer.centroids, objective.target.centroids)


@pytest.mark.parametrize("use_bn", [False, True])
def test_dino(use_bn):
    objective = small_objective("dino", f"objective.use_bn_in_head={str(use_bn).lower()}")
    example = load("dino")
    head = example.Head(16, 32, use_bn, hidden_dim=16, bottleneck_dim=8)
    model = example.DINO(vit(dynamic_img_size=True), head)
    renamed = copy_weights(objective, model)
    for step in range(2):  # the second with a center and a teacher that have moved
        batch, views = batch_of(objective)
        objective.begin_step()
        objective.zero_grad()
        model.zero_grad()
        large = torch.stack([views["global1"], views["global2"]])
        loss, entropy, teacher = model.loss(large, views["local"].transpose(0, 1))
        expected = objective(batch)
        assert entropy.item() == pytest.approx(expected["teacher_entropy"].item(), rel=1e-6)
        compare(objective, loss, expected["loss"], model, renamed)
        objective.on_optimizer_step(step, 10, lambda t: t)
        model.update(teacher, example.cosine(step, 10, example.MOMENTUM_TEACHER, 1.0))
        state = model.state_dict()
        for name, value in objective.state_dict().items():
            torch.testing.assert_close(state[renamed[name]], value, rtol=1e-6, atol=1e-7)
    assert model.center.abs().max() > 0


def test_supervised():
    objective, example = small_objective("supervised", "backbone.drop_path_rate=0"), load("supervised")
    model = example.Supervised(vit(num_classes=5))
    assert (model.vit.head.weight == 0).all()
    renamed = copy_weights(objective, model)
    batch, views = batch_of(objective)
    loss = model.loss(views["image"], batch.labels)
    assert loss.item() != pytest.approx(F.cross_entropy(model.vit(views["image"]), batch.labels).item(), rel=1e-3)
    compare(objective, loss, objective(batch)["loss"], model, renamed)


# -- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_s_python_runs(capsys):
    blocks = [body for _, language, body in FENCE.findall((ROOT / "README.md").read_text()) if language == "python"]
    [tour] = [body for body in blocks if body.startswith("import copy, timm, torch")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {}
        exec(compile(tour, "README.md", "exec"), made)
    loss, predicted = re.fullmatch(r"(\S+) \[(.*)\]\n", capsys.readouterr().out).groups()
    assert float(loss) == pytest.approx(made["loss"].item()) and 0 < float(loss) < 2 * math.log(64)
    assert len(predicted.split()) == 4 and set(predicted.split()) <= {"0", "1"}
    assert made["student"].shape == (6, 16, 64) and made["crops"]["global1"].min() < -1
    made["loss"].backward()
    assert made["vit"].head.weight.grad.abs().max() > 0
    assert all(weight.grad is None for weight in made["teacher"].parameters())
