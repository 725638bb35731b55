"""What the images say of themselves reaches everything that uses it: size, channels, mean, std, flip and classes, in
pre-training, fine-tuning and the linear presets; and each step's schedule reaches the optimizer."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import SMALL, small_objective
from test_features import small_source
from test_finetune import QUICK
from test_loop import TINY, run

from eval import finetune, linear_probe
from eval.measure import features, linear_heads
from ssl_vit import backbones, data, objectives, pretrain, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

SIZE, CLASSES, COUNT = (16, 24), 3, 40
TASKS = ["simmim", "supervised objective.mixup=0 objective.cutmix=0", "dino objective.local_crops_number=2"]
RECIPES = [*SMALL, "multitask"]


def ramp(flip: bool, channels: int = 3) -> data.ImageSet:
    """Images that grow brighter from left to right, so that a mirrored one shows; each channel has its own range."""
    bright = torch.linspace(40, 200, SIZE[1]) + torch.arange(COUNT).view(-1, 1, 1, 1) % 7
    images = bright * torch.linspace(1.0, 0.5, channels).view(1, -1, 1, 1)
    return data.ImageSet(
        name="ramp",
        split="train",
        labels=torch.arange(COUNT) % CLASSES,
        classes=list("abc"),
        fingerprint="0",
        channels=channels,
        count=COUNT,
        size=SIZE,
        images=images.expand(-1, -1, *SIZE).round().byte().contiguous(),
        flip=flip,
    )


def built(name: str, images: data.ImageSet, *settings: str) -> tuple[recipes.Recipe, objectives.Objective]:
    """As the loop builds a shipped recipe on these images."""
    own = [f"objective.tasks={json.dumps(TASKS)}"] if name == "multitask" else SMALL[name]
    recipe = objectives.read_recipe(
        name, [*TINY[:4], "backbone.patch_size=4", *own, "views.augmentation=crop+flip", *settings], None
    )
    recipe.add_dataset_info(images.info())
    return recipe, pretrain.build(recipe, images)


def mirrored(views: torch.Tensor) -> torch.Tensor:
    """bool: which of these views (…, C, h, w) of a ramp are darker on the right."""
    halves = views.chunk(2, -1)
    return halves[0].mean((-3, -2, -1)) > halves[-1].mean((-3, -2, -1))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("own", "asked", "flips"), [(False, None, False), (True, None, True), (True, False, False)])
def test_images_are_mirrored_where_that_keeps_the_label_and_nowhere_else(name, own, asked, flips):
    images = ramp(own)
    _, objective = built(name, images, *([] if asked is None else [f"data.hflip={str(asked).lower()}"]))
    rows = np.arange(64)
    [chunk] = data.chunks(images, objective.views, iter([(0, rows, rows % COUNT)]), 0, torch.device("cpu"), 0)
    for view, made in chunk.views(images, objective.views).items():
        share = mirrored(made).float().mean().item()
        assert 0.3 < share < 0.7 if flips else share == 0, (view, share)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("channels", [3, 4])
def test_size_channels_mean_std_and_classes_reach_the_objective(name, channels):
    if name == "masked-patch" and channels == 4:
        pytest.skip("its colours are of three channels at most")
    images = ramp(True, channels)
    recipe, objective = built(name, images)
    flat = images.images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(channels, -1) / 255
    found = [module for module in objective.modules() if isinstance(module, backbones.Backbone)]
    assert objective.exported in found
    for backbone in found:
        assert backbone.mean.flatten().tolist() == pytest.approx(flat.mean(1).tolist(), abs=1e-4)
        assert backbone.std.flatten().tolist() == pytest.approx(flat.std(1).tolist(), abs=1e-4)
        assert backbone.input_size == SIZE and backbone.model.patch_embed.proj.in_channels == channels
        assert backbone.model.patch_embed.grid_size == (4, 6)
    for view_name, view in objective.views.items():
        assert view.size == SIZE or view_name.endswith("local")
    parts = list(getattr(objective, "tasks", [objective]))
    kinds = {type(part).__name__ for part in parts}
    for part in parts:
        if type(part).__name__ == "Supervised":
            assert part.classes == part.backbone.model.head.out_features == CLASSES
        if type(part).__name__ == "Reconstruct":
            assert part.grid == (4, 6)
            if part.config.target == "pixels":
                assert part.target.width == 4 * 4 * channels
            if part.config.target == "colour":
                assert torch.equal(part.target.mean, part.backbone.mean.flatten())
                assert torch.equal(part.target.std, part.backbone.std.flatten())
    assert len(kinds) == (3 if name == "multitask" else 1)
    assert recipe.data.mean == pytest.approx(flat.mean(1).tolist(), abs=1e-4)


def test_mean_and_std_travel_with_the_weights(tmp_path):
    _, objective = built("mae", ramp(True))
    weights.save(objective.exported, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert saved["mean"] == pytest.approx(objective.backbone.mean.flatten().tolist(), abs=1e-6)
    assert saved["std"] == pytest.approx(objective.backbone.std.flatten().tolist(), abs=1e-6)
    assert saved["input_size"] == [3, *SIZE] and (saved["mean"], saved["std"]) != (saved["std"], saved["mean"])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["mae", "dino", "supervised"])
def test_the_interpolation_of_the_views_travels_with_the_weights(name, interpolation, tmp_path):
    """From the recipe to the crops, the evaluation view, the exported model, and what fine-tuning begins with."""
    _, objective = built(name, ramp(True), f"views.interpolation={interpolation}")
    assert {view.interpolation for view in objective.views.values()} == {interpolation}
    weights.save(objective.exported, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["interpolation"] == interpolation
    source = features.open_source(str(tmp_path), recipes.Data(), None)
    assert finetune.make_recipe(source, recipes.Data(), []).views.interpolation == interpolation
    asked = finetune.make_recipe(source, recipes.Data(), ["views.interpolation=bilinear"])
    assert asked.views.interpolation == "bilinear"


# -- fine-tuning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_s", "asked", "flips"),
    [([], [], False), ([], ["data.hflip=true"], True), (["data.hflip=true"], [], True)],
)
def test_fine_tuning_takes_flip_from_the_user_then_the_run_then_the_images(run_s, asked, flips, tmp_path, monkeypatch):
    """The digits are not to be mirrored; mean, std and size are the backbone's, classes those of the images."""
    monkeypatch.chdir(tmp_path)
    stated = ["data.mean=[0.2]", "data.std=[0.4]", *run_s]
    pretrain.pretrain(
        objectives.read_recipe("mae", [*TINY, *SMALL["mae"], "train.steps=0", *stated], None), tmp_path / "run"
    )
    objectives_built, build = [], pretrain.build
    monkeypatch.setattr(pretrain, "build", lambda *a: objectives_built.append(build(*a)) or objectives_built[-1])
    quick = [*QUICK, "train.steps=0", *asked]
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--backbone", "run", *quick])
    finetune.main()
    [objective] = objectives_built
    assert {view.flip for view in objective.views.values()} == {0.5 if flips else 0.0}
    assert objective.backbone.mean.item() == pytest.approx(0.2) and objective.backbone.std.item() == pytest.approx(0.4)
    assert {view.size for view in objective.views.values()} == {(8, 8)} and objective.classes == 10
    [recipe] = tmp_path.glob("run/finetune/*/recipe.yaml")
    assert yaml.safe_load(recipe.read_text())["data"]["hflip"] is flips


# -- the linear presets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", linear_heads.PROBE_RECIPES)
@pytest.mark.parametrize("flips", [False, True])
def test_the_presets_train_on_views_of_the_chosen_images_mirrored_only_where_that_keeps_the_label(
    preset, flips, tmp_path, monkeypatch
):
    images = ramp(flips)
    images.images = images.images[:, :1]
    source = small_source(tmp_path)
    monkeypatch.setattr(type(source.backbone), "input_size", SIZE)
    seen = []
    monkeypatch.setattr(
        features, "pool", lambda source, view, blocks: seen.append(view) or {(1, "cls"): view.flatten(1)}
    )
    probe = SimpleNamespace(source=source, state=PartialState(cpu=True), train=images, seed=0)
    chosen = np.flatnonzero(np.arange(COUNT) % CLASSES != 1)  # of two classes alone
    batches = list(
        linear_probe.augmented(probe, chosen, linear_heads.PROBE_RECIPES[preset], "cls", [1], steps=3, batch=20)
    )
    assert len(batches) == 3 and all(view.shape[1:] == (1, *SIZE) for view in seen)
    share = mirrored(torch.cat(seen)).float().mean().item()
    assert 0.3 < share < 0.7 if flips else share == 0
    labels = torch.cat([labels for _, labels in batches])
    assert labels.bincount(minlength=3)[1] == 0 and len(labels) == 60
    epoch = labels[: len(chosen)]  # an epoch is each chosen image once
    assert epoch.bincount(minlength=3).tolist() == np.bincount(images.labels.numpy()[chosen], minlength=3).tolist()


@pytest.mark.parametrize(("asked", "flips"), [([], False), (["data.hflip=true"], True)])
def test_evaluators_take_a_run_s_own_flip(asked, flips, tmp_path):
    pretrain.pretrain(
        objectives.read_recipe("mae", [*TINY, *SMALL["mae"], "train.steps=0", *asked], None), tmp_path / "run"
    )
    source = features.open_source(str(tmp_path / "run"), None, None)
    assert data.load(features.data_of(source.settings), "train").flip is flips
    assert data.load(dataclasses.replace(features.data_of(source.settings), hflip=None), "report").flip is False


# -- schedules in the loop --------------------------------------------------------------------------------------------


def test_every_step_of_the_loop_is_taken_at_its_own_learning_rate_and_weight_decay(tmp_path, monkeypatch):
    taken = tmp_path / "taken.jsonl"
    step = torch.optim.AdamW.step

    def remember(self, *rest):
        with open(taken, "a") as file:
            groups = [[g["lr"], g["weight_decay"]] for g in self.param_groups if g["decays"]]
            print(json.dumps(groups), file=file)
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    settings = ["train.steps=10", "optim.lr=0.01", "optim.lr_rule=B/256", "optim.min_lr=0", "optim.warmup_fraction=0.2"]
    settings += ["optim.weight_decay=0.1", "optim.weight_decay_end=0.5", "optim.layer_decay=1"]
    run(tmp_path, "--recipe", "mae", *TINY, *SMALL["mae"], *settings, "--output", "run")
    found = [json.loads(line) for line in taken.read_text().splitlines()]
    logged = [json.loads(line)["lr"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(found) == len(logged) == 10
    for t, (groups, lr) in enumerate(zip(found, logged, strict=True)):
        peak = 0.01 * 32 / 256
        rate = peak * (t + 1) / 2 if t < 2 else peak * (1 + math.cos(math.pi * (t - 2) / 7)) / 2
        decay = 0.5 - 0.4 * (1 + math.cos(math.pi * t / 9)) / 2
        assert lr == pytest.approx(rate, abs=1e-12)
        for group in groups:
            assert group == pytest.approx([rate, decay], abs=1e-12), t


def test_settings_that_a_backbone_cannot_follow_are_refused_or_not_recorded():
    images = data.load(recipes.Data(name="digits"), "train")
    shape = ["backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null"]

    def built(name, *settings):
        recipe = objectives.read_recipe(name, settings, None)
        recipe.add_dataset_info(images.info())
        return pretrain.build(recipe, images), recipe

    for name, size, words in (("resnet18", 32, "no patches"), ("swin_tiny_patch4_window7_224", 224, "patches of 4")):
        with pytest.raises(UserError, match=f"{words}, whatever backbone.patch_size says: leave it out"):
            built("supervised", f"backbone.name={name}", "backbone.patch_size=8", f"data.img_size={size}", *shape)
    # a patch size that the name states asks for nothing
    beit, _ = built("gaussian", "backbone.name=beit_base_patch16_224", "data.img_size=32", *shape)
    assert beit.grid == (2, 2)
    eva = ["backbone.name=eva02_tiny_patch14_224", "backbone.patch_size=2", "backbone.embed_dim=48", "backbone.depth=1"]
    objective, recipe = built("mae", *eva, "backbone.num_heads=3", "backbone.pos_embed=sincos")
    assert recipe.backbone.pos_embed == "learned" and objective.backbone.model.pos_embed.requires_grad
    objective, recipe = built("mae", "backbone.pos_embed=sincos")
    assert recipe.backbone.pos_embed == "sincos" and not objective.backbone.model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("name", "read"), [("cvt", {"token": "token", "avg": "avg"}), ("swin", {"token": "avg", "avg": "avg"})]
)
def test_a_classifier_reads_what_it_is_said_to_read(name, read):
    shape = ["backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null", "backbone.drop_path_rate=0"]
    for asked, found in read.items():
        settings = [f"backbone.name={name}", "data.img_size=32", f"objective.global_pool={asked}", *shape]
        backbone = small_objective("supervised", *settings).backbone
        assert backbone.pooling(asked) == found
        with torch.no_grad():
            for weight in backbone.classifiers[0].parameters():
                weight.normal_()
            images = torch.rand(2, 3, 32, 32)
            tokens = backbone.eval()(images)
            pooled = tokens[:, 0] if found == "token" else tokens[:, int(name == "cvt") :].mean(1)
            [head] = [part for part in backbone.classifiers[0].modules() if isinstance(part, torch.nn.Linear)]
            torch.testing.assert_close(backbone.classify(images), head(pooled), rtol=1e-4, atol=1e-5)
