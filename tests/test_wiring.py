"""That settings reach what they are for: the loop, the objectives' views, the formulas. Each was a line that could be
deleted or exchanged without another test seeing it."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import SMALL, make_batch, small, small_objective
from safetensors.torch import load_file
from test_loop import TINY, arguments, run

from ssl_vit import data, engine, monitor, objectives, pretrain, weights
from ssl_vit.objectives import reconstruct, supervised
from ssl_vit.objectives.dino import Head
from ssl_vit.randomness import Order
from ssl_vit.views import View


def trained(folder, name, *settings):
    """(recipe, path) of a run in this process."""
    recipe = objectives.read_recipe(name, [*TINY, "train.steps=3", *small(name, *settings)], None)
    path = folder / f"{name}-{len(list(folder.iterdir()))}"
    assert pretrain.pretrain(recipe, path) == 0
    return recipe, path


def built(recipe):
    """(the objective that a run begins with, its images)"""
    images = data.load(recipe.data, "train")
    recipe.add_dataset_info(images.info())
    return pretrain.build(recipe, images), images


def state(path):
    [file] = (path / "checkpoints").iterdir()
    return torch.load(file, weights_only=True)["objective"]


# -- the seed ---------------------------------------------------------------------------------------------------------


def test_weights_and_heads_are_the_seed_s():
    """Intervals over seeds rest on it."""
    zero, one = (
        built(objectives.read_recipe("mae", [*TINY, *SMALL["mae"], f"train.seed={s}"], None))[0].state_dict()
        for s in (0, 1)
    )
    alike = {key for key, value in zero.items() if torch.equal(value, one[key])}
    drawn = {key for key, value in zero.items() if value.std() > 0 and "pos_embed" not in key}  # sine-cosine
    assert {key.partition(".")[0] for key in drawn} >= {"backbone", "decoder"} and not alike & drawn


@pytest.mark.parametrize("settings", [["mae"], ["deit", "views.repeats=3"]])
def test_images_and_draws_are_the_seed_s(settings, tmp_path, monkeypatch):
    """And each image is shown views.repeats times in a step."""
    seen = []
    make = data.chunks

    def watched(images, views, plan, seed, *rest):
        plan = list(plan)
        seen.append((plan, seed))
        return make(images, views, iter(plan), seed, *rest)

    monkeypatch.setattr(data, "chunks", watched)
    recipe, _ = trained(tmp_path, *settings, "train.seed=7")
    [(plan, seed)] = seen
    order = Order(7, 1437, 32, recipe.views.repeats)
    assert seed == 7 and [step for step, _, _ in plan] == [0, 1, 2]
    assert all((indices == order.indices(step, rows)).all() for step, rows, indices in plan)
    assert len(set(plan[0][2])) == math.ceil(32 / recipe.views.repeats) == (32 if settings == ["mae"] else 11)


# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("beit", [], "target.centroids"),
        ("gaussian", ["objective.noise_pca_dim=2"], "pca.components"),
    ],
)
def test_what_is_fitted_is_fitted_to_the_run_s_images(name, settings, key, tmp_path):
    """Centroids of zeros would give every patch one token, and the loss would fall."""
    recipe, path = trained(tmp_path, name, *settings)
    expected, images = built(objectives.read_recipe(name, [*TINY, *small(name, *settings)], None))
    assert not expected.state_dict()[key].any()
    expected.fit(pretrain.fit_images(recipe, images, torch.device("cpu")), recipe.train.seed)
    torch.testing.assert_close(state(path)[key], expected.state_dict()[key])


@pytest.mark.parametrize("fraction", [0, 1])
def test_the_last_layer_of_dino_is_frozen_while_it_should_be(fraction, tmp_path):
    settings = [f"objective.freeze_last_layer_fraction={fraction}", "optim.weight_decay=0.5"]
    recipe, path = trained(tmp_path, "dino", *settings)
    objective, _ = built(objectives.read_recipe("dino", [*TINY, *SMALL["dino"]], None))
    before, after = objective.state_dict(), state(path)
    assert torch.equal(before["head.last.direction"], after["head.last.direction"]) == bool(fraction)
    assert not torch.equal(before["head.mlp.0.weight"], after["head.mlp.0.weight"])


def test_bf16_is_computed_in_bf16(tmp_path):
    found = []
    for precision in ("bf16", "fp32"):  # in processes of their own: one has one precision
        run(tmp_path, *arguments("mae", "train.steps=3", f"train.precision={precision}", "--output", precision))
        found.append(load_file(tmp_path / precision / "backbone/model.safetensors"))
    assert not torch.equal(*(weights["blocks.0.mlp.fc1.weight"] for weights in found))
    assert all(value.dtype == torch.float32 for value in found[0].values())


def test_gradients_are_clipped_before_the_optimizer_s_step_and_weights_averaged_behind_it(tmp_path, monkeypatch):
    """And online k-NN measures the averaged ones, which are exported."""
    norms, students, seen = [], [], []
    step, knn = torch.optim.AdamW.step, monitor.OnlineKnn.__call__

    def watched(self, *given):
        every = [weight for group in self.param_groups for weight in group["params"]]
        norms.append(max(float(weight.grad.norm()) for weight in every if weight.grad is not None))
        found = step(self, *given)
        students.append([weight.detach().clone() for weight in every])
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(monitor.OnlineKnn, "__call__", lambda self, b: seen.append(weights.digest(b)) or knn(self, b))
    settings = ["optim.clip_grad=1e-3", "objective.momentum_teacher=0.5", "monitor.knn_every=1", "runtime.keep_every=1"]
    recipe, path = trained(tmp_path, "dino", *settings, "train.steps=2", "optim.warmup_fraction=0", "optim.lr=0.1")
    assert all(0 < norm <= 1.00001e-3 for norm in norms) and len(norms) == 2
    kept = [weights.load(str(path / "backbones" / f"step-{at:08d}")) for at in (1, 2)]
    assert seen == [weights.digest(backbone) for backbone in kept]
    start, _ = built(objectives.read_recipe("dino", [*TINY, *SMALL["dino"]], None))
    name = "blocks.0.mlp.fc1.weight"
    before, after = start.backbone.model.get_parameter(name), kept[0].model.get_parameter(name)
    [moved] = [weight for weight in students[0] if weight.shape == before.shape and not torch.equal(weight, before)
               and torch.allclose(weight + before, 2 * after, atol=1e-6)]  # fmt: skip
    assert not torch.allclose(moved, before, atol=1e-3)


def test_what_is_frozen_keeps_its_statistics(tmp_path):
    """The loop puts the backbone in eval mode while it does not learn."""
    shape = ["backbone.name=cvt", "backbone.embed_dim=48", *(f"backbone.{key}=null" for key in ("depth", "num_heads"))]
    _, start = trained(tmp_path, "simmim", *shape, "train.steps=1")
    frozen = [f"backbone.init_from={start}", "train.freeze_backbone_fraction=1"]
    _, path = trained(tmp_path, "simmim", *shape, *frozen)
    before, after = (load_file(folder / "backbone/model.safetensors") for folder in (start, path))
    assert any("running_mean" in key for key in before) and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_mixing_is_as_the_recipe_says(tmp_path, monkeypatch):
    seen = set()
    mix = supervised.views.mix
    monkeypatch.setattr(supervised.views, "mix", lambda i, t, d, *how: seen.add(how) or mix(i, t, d, *how))
    mixing = dict(mixup=0.3, cutmix=0.7, mixup_prob=0.6, mixup_mode="batch")
    trained(tmp_path, "supervised", *(f"objective.{key}={value}" for key, value in mixing.items()))
    assert seen == {(0.3, 0.7, 0.6, "batch")}


@pytest.mark.parametrize(
    ("setting", "module", "function"),
    [
        ("runtime.activation_checkpointing=true", engine.recomputation, "recompute"),
        ("runtime.compile=true", engine.compilation, "compile_blocks"),
    ],
)
def test_blocks_are_recomputed_and_compiled_where_that_is_asked_for(setting, module, function, tmp_path, monkeypatch):
    """Neither changes a number, so that nothing else would tell."""
    seen = []
    monkeypatch.setattr(module, function, lambda blocks, *_: seen.append(len(blocks)))
    trained(tmp_path, "mae")
    assert seen == []
    trained(tmp_path, "mae", setting)
    assert seen == [3]  # two of the backbone, one of the decoder


# -- views ------------------------------------------------------------------------------------------------------------

CROP = dict(scale=(0.31, 0.9), flip=0.5, interpolation="bicubic")
COLOUR = dict(jitter=0.8, grey=0.2)
SECOND = View((16, 16), **CROP, **COLOUR, blur=0.1, solarize=0.2)
SINGLE = {
    "none": View((16, 16), crop=False, flip=0.0, interpolation="bicubic"),
    "crop+flip": View((16, 16), **CROP),
    "dino": SECOND,
    "three-augment": View(
        (16, 16), **CROP, jitter=1.0, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.0, three_augment=True
    ),
    "rand-augment": View((16, 16), **CROP, rand_augment=6.0),
}
VIEWS = ["views.scale=[0.31,0.9]", "views.interpolation=bicubic", "views.blur=true"]


@pytest.mark.parametrize("augmentation", SINGLE)
def test_one_view_is_as_the_recipe_says(augmentation):
    own = [text for text in VIEWS if augmentation != "none" or "scale" not in text]
    own += ["views.magnitude=6"] * (augmentation == "rand-augment")
    objective = small_objective("mae", *own, f"views.augmentation={augmentation}")
    assert objective.views == {"image": SINGLE[augmentation]}


@pytest.mark.parametrize("colour", [False, True])
def test_the_views_of_dino_are_as_the_recipe_says(colour):
    local = [
        "objective.local_crops_scale=[0.07,0.29]",
        "objective.local_crops_number=3",
        "objective.local_crops_size=8",
    ]
    objective = small_objective("dino", *VIEWS, *local, f"views.augmentation={'dino' if colour else 'crop+flip'}")
    plain = View((16, 16), **CROP, **(COLOUR if colour else {}))
    small = dataclasses.replace(plain, size=(8, 8), count=3, scale=(0.07, 0.29))
    assert objective.views == {
        "global1": dataclasses.replace(plain, blur=1.0 if colour else 0.0),
        "global2": SECOND if colour else plain,
        "local": dataclasses.replace(small, blur=0.5 if colour else 0.0),
    }
    sharp = small_objective("dino", *VIEWS, *local, "views.augmentation=dino", "views.blur=false").views
    assert {view.blur for view in sharp.values()} == {0.0}


# -- formulas by hand -------------------------------------------------------------------------------------------------


def test_simmim_s_loss_by_hand():
    """The mean absolute difference over the values of the masked patches (simmim.py of the official code)."""
    objective = small_objective("simmim").double().eval()
    batch = make_batch(objective, torch.arange(3), dtype=torch.float64)
    images, patch = batch.views["image"], objective.backbone.stride[0]
    prediction, mask, *_ = objective.predict(images, batch.draw)
    mean = torch.tensor([0.5, 0.45, 0.4], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.25, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    across, total, count = 16 // patch, 0.0, 0
    for image, predicted, hidden in zip((images - mean) / std, prediction, mask, strict=True):
        for place in hidden.nonzero().flatten().tolist():
            top, left = place // across * patch, place % across * patch
            pixels = image[:, top : top + patch, left : left + patch].permute(1, 2, 0).flatten()
            total += (predicted[place] - pixels).abs().sum().item()
            count += len(pixels)
    assert objective(batch)["loss"].item() == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("name", ["beit", "simmim", "masked-patch"])
def test_a_linear_head_sees_the_masked_patches_alone_and_the_loss_is_the_same(name, monkeypatch):
    objective = small_objective(name).double()
    batch = make_batch(objective, torch.arange(4), dtype=torch.float64)
    seen = []
    objective.decoder.head.register_forward_hook(lambda head, inputs, output: seen.append(tuple(output.shape[:2])))
    loss = objective(batch)["loss"]
    trained = [weight for weight in objective.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    predict = objective.predict
    monkeypatch.setattr(objective, "predict", lambda images, draw, whole: predict(images, draw))
    whole = objective(batch)["loss"]
    expected = torch.autograd.grad(whole, trained, allow_unused=True)
    assert seen == [(4, objective.num_masked), (4, 64)] and objective.num_masked < 64
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    for one, other in zip(gradients, expected, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fixed", [False, True])
def test_dino_s_head_by_hand(fixed):
    """Three layers, a unit bottleneck, and unit rows times their length (DINOHead in vision_transformer.py)."""
    torch.manual_seed(0)
    head = Head(6, 5, norm_last_layer=fixed, hidden_dim=7, bottleneck_dim=4).double()
    if not fixed:
        torch.nn.init.uniform_(head.last.length, 0.5, 2.0)
    x = torch.randn(3, 6, dtype=torch.float64)
    given, y = head.state_dict(), x
    for layer in (0, 3, 6):
        y = y @ given[f"mlp.{layer}.weight"].T + given[f"mlp.{layer}.bias"]
        if layer < 6:
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
    y = y / y.square().sum(1, keepdim=True).sqrt()
    rows = given["last.direction"] / given["last.direction"].square().sum(1, keepdim=True).sqrt()
    rows = rows if fixed else rows * given["last.length"]
    torch.testing.assert_close(head(x), y @ rows.T)
    assert {name for name, p in head.named_parameters() if "last" in name} == {"last.direction"} | (
        set() if fixed else {"last.length"}
    )


def test_dino_s_logits_are_not_rounded_to_bf16():
    """The temperatures divide them: a rounding of 0.002 would be one of 5 % in a probability."""
    torch.manual_seed(0)
    head = Head(6, 5, norm_last_layer=True, hidden_dim=7, bottleneck_dim=4)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        unit = torch.nn.functional.normalize(head.mlp(x), dim=-1)
        logits = head(x)
    rows = torch.nn.functional.normalize(head.last.direction, dim=-1)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, unit.float() @ rows.T, rtol=1e-6, atol=1e-6)


def test_the_prototypes_of_dino_may_have_lengths():
    fixed, learnt = (small_objective("dino", f"objective.norm_last_layer={value}").head for value in ("true", "false"))
    assert fixed.last.length is None and learnt.last.length is not None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tokenizer", []),
        ("gaussian", ["objective.target=noise"]),
        ("mae", ["objective.target=features"]),
        ("mae", []),
    ],
)
def test_the_loss_is_the_one_that_is_named(name, settings):
    """Absolute errors of 2 are 2, and squared ones 4, by every target of numbers."""
    found = []
    for loss in ("l1", "mse"):
        objective = small_objective(name, *settings, f"objective.loss={loss}")
        target = objective.pixels if name == "tokenizer" else objective.target
        found.append(float(target.loss(torch.zeros(3, target.width), torch.full((3, target.width), 2.0)).mean()))
    assert found == [2.0, 4.0]


def test_images_are_erased_before_they_are_mixed(monkeypatch):
    """As timm's loader does, so that a mixture has the hole of each of the two."""
    objective = small_objective("deit", "objective.reprob=1", "objective.mixup=0.8", "views.repeats=1")
    calls = []
    erase, mix = objective.erase, supervised.views.mix
    monkeypatch.setattr(objective, "erase", lambda *given: calls.append("erase") or erase(*given))
    monkeypatch.setattr(supervised.views, "mix", lambda *given: calls.append("mix") or mix(*given))
    objective(make_batch(objective, torch.arange(8)))
    assert calls == ["erase", "mix"]


def test_pictures_are_of_a_model_that_is_not_trained(tmp_path, monkeypatch):
    """Without stochastic depth, whatever is shown."""
    modes = []
    show = reconstruct.Reconstruct.show
    monkeypatch.setattr(
        reconstruct.Reconstruct, "show", lambda self, *given: modes.append(self.training) or show(self, *given)
    )
    trained(tmp_path, "mae")
    assert modes == [False]


def test_what_targets_are_fitted_to_is_spread_over_the_images(monkeypatch):
    """Folders come class by class: the first ten thousand would be of a few classes."""
    recipe = objectives.read_recipe("beit", [*TINY, *SMALL["beit"]], None)
    recipe.data.img_size = [32, 32]

    class Images:
        channels = 3

        def __len__(self):
            return 25_000

    monkeypatch.setattr(data, "evaluation_views", lambda images, view, device, chosen: [chosen])
    chosen = pretrain.fit_images(recipe, Images(), torch.device("cpu")).tolist()
    assert len(chosen) == 10_000 and chosen[0] == 0 and chosen[-1] == 24_999
    assert max(b - a for a, b in itertools.pairwise(chosen)) == 3
