"""The recipes and the published code: no unsaid departure; what a published recipe resolves to, without images."""

import functools
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from generate import fidelity

from ssl_vit import corruption, flops, objectives, optim, plan, pretrain
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

ROOT = Path(__file__).parent.parent
SOME = {
    f"imagenet/{n}"
    for n in ("mae-vit-b", "deit-ti", "dino-vit-s16", "vit-s16-baseline", "beit-vit-b", "vit-finetune-b16")
}
PUBLISHED = sorted(f"imagenet/{path.stem}" for path in (recipes.RECIPES / "imagenet").glob("*.yaml"))


@pytest.mark.parametrize("name", fidelity.RECIPES)
def test_no_recipe_departs_unsaid(name):
    """Nor is a reason given for what does not depart."""
    assert fidelity.departures(name).keys() == fidelity.RECIPES[name].reasons.keys()


def test_a_departure_is_found(monkeypatch):
    """Of a number, a list, a word; not of rounding."""
    read = objectives.read_recipe

    def changed(*named):
        recipe = read(*named)
        recipe.optim.lr, recipe.optim.betas, recipe.views.interpolation = 1.6e-4, [0.9, 0.99], "bilinear"
        recipe.optim.warmup_fraction *= 1.001
        return recipe

    monkeypatch.setattr(objectives, "read_recipe", changed)
    found = fidelity.departures("imagenet/mae-vit-b")
    assert found.keys() == {"optim.lr", "optim.betas", "views.interpolation"}
    assert found["optim.betas"] == ([0.9, 0.99], [0.9, 0.95]) and "**unsaid**" in fidelity.page()


def test_every_published_recipe_is_compared():
    assert set(PUBLISHED) <= fidelity.RECIPES.keys() and len(PUBLISHED) == 23
    assert {"mae", "dino", "beit", "simmim", "gaussian", "supervised", "deit"} <= fidelity.RECIPES.keys()


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs" / "fidelity.md").read_text() == fidelity.page()


def test_recipes_share_a_heading_where_their_tables_are_equal():
    """Each is under one heading, with its own departures and counts; no two headings have the same table."""
    tables, of_recipe = [], {}
    for part in fidelity.page().split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        tables.append([line for line in text.splitlines() if line.startswith("|")])
        for name in heading.split(", "):
            assert name not in of_recipe
            of_recipe[name] = text
    assert of_recipe.keys() == fidelity.RECIPES.keys()
    assert len(tables) == len({tuple(rows) for rows in tables}) < len(of_recipe)
    for name, text in of_recipe.items():
        entry = fidelity.RECIPES[name]
        assert re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE) == list(fidelity.departures(name))
        assert all(f"| {what} | {here} | {there} |" in text for what, there, here in entry.absent)
        count = f"{len(entry.official) - len(entry.reasons)} of {len(entry.official)}"
        [sentence] = [line for line in text.splitlines() if "settings are as published" in line]
        told = [part for part in sentence.split("; ") if name in re.findall(r"[\w/-]+", part)] or [sentence]
        assert len(told) == 1 and told[0].startswith(f"{count} "), name
    assert of_recipe["imagenet/vit-b16"] is of_recipe["imagenet/vit-h14"] is not of_recipe["imagenet/vit-finetune-b16"]


def asked(name: str, *settings: str) -> recipes.Recipe:
    """A published recipe with settings."""
    return objectives.read_recipe(name, list(settings), None)


@functools.cache
def of(name: str, devices: int = 8) -> plan.Plan:
    return plan.make(asked(name), pretrain.build, devices)


@pytest.mark.parametrize(
    ("name", "parameters", "tokens", "batch", "lr", "steps", "warmup"),
    [  # parameters in millions, as published with the models
        ("mae-vit-b", 85.8, dict(image=197), 4096, 2.4e-3, 500_456, 12_511),
        ("mae-vit-h", 630.8, dict(image=257), 4096, 2.4e-3, 500_456, 12_511),
        ("mae-finetune-vit-l", 304.3, dict(image=197), 1024, 4e-3, 62_557, 6256),
        ("dino-vit-s16", 21.7, dict(global1=197, global2=197, local=370), 1024, 2e-3, 1_000_912, 12_511),
        ("beit-vit-b", 85.8, dict(image=197), 2048, 1.5e-3, 500_456, 6256),
        ("simmim-vit-b", 85.8, dict(image=197), 2048, 4e-4, 500_456, 6256),
        ("deit-ti", 5.7, dict(image=197), 1024, 1e-3, 375_342, 6257),
        ("deit-b-distilled", 87.3, dict(image=198), 1024, 1e-3, 375_342, 6257),
        ("vit-s16-baseline", 22.1, dict(image=197), 1024, 1e-3, 112_603, 9999),
        ("vit-l16", 303.3, dict(image=197), 4096, 3e-3, 93_836, 10_003),
        ("vit-finetune-b16", 86.9, dict(image=577), 512, 0.03, 20_000, 500),
    ],
)
def test_what_a_published_recipe_resolves_to(name, parameters, tokens, batch, lr, steps, warmup):
    found = of(f"imagenet/{name}")
    assert found.parameters / 1e6 == pytest.approx(parameters, abs=0.06)
    assert found.tokens == tokens and found.batch_size == batch and found.steps == steps
    assert found.lr == pytest.approx(lr) and found.warmup == pytest.approx(warmup, abs=2)


def objective_of(name: str):
    recipe = asked(name)
    return recipe, plan.weightless(recipe, plan.facts(recipe), pretrain.build)


def groups_of(name: str):
    recipe, objective = objective_of(name)
    optimizer = optim.build(objective, recipe.optim, recipe.learning_rate()[0])
    names = {id(weight): key for key, weight in objective.named_parameters()}
    return recipe, optimizer, {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_layer_wise_rates_and_decay_of_fine_tuning():
    """main_finetune.py: 0.65 to the distance from the head; biases, norms, positions and class token do not decay."""
    recipe, optimizer, group_of = groups_of("imagenet/mae-finetune-vit-b")
    prefix = "backbone.model."
    for key, layer in {"cls_token": 0, "patch_embed.proj.weight": 0, "blocks.0.attn.qkv.weight": 1}.items():
        assert group_of[prefix + key]["lr_scale"] == pytest.approx(0.65 ** (13 - layer))
    assert group_of[prefix + "blocks.11.mlp.fc2.weight"]["lr_scale"] == pytest.approx(0.65)
    assert group_of[prefix + "head.weight"]["lr_scale"] == 1 == group_of[prefix + "norm.weight"]["lr_scale"]
    still = {key.removeprefix(prefix) for key, group in group_of.items() if not group["decays"]}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias", "blocks.3.attn.qkv.bias"} <= still
    assert not {key for key in still if key.endswith(".weight") and "norm" not in key}
    rate = optim.set_schedule(optimizer, recipe.optim, 2e-3, 6255, 125_114)
    assert rate == pytest.approx(2e-3) and recipe.optim.clip_grad is None
    group = group_of[prefix + "blocks.0.attn.qkv.weight"]
    assert group["lr"] == pytest.approx(2e-3 * 0.65**12) and group["weight_decay"] == 0.05


def test_sgd_and_a_new_head_of_the_vit_paper_s_fine_tuning():
    """One rate and no weight decay for all; a zero head of one layer over the class token, in the exported model."""
    _, optimizer, group_of = groups_of("imagenet/vit-finetune-b16")
    assert isinstance(optimizer, torch.optim.SGD) and {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0} and len(group_of) == 152
    recipe = asked("imagenet/vit-finetune-b16")
    recipe.backbone.depth, recipe.data.img_size = 1, 32
    objective = pretrain.build(recipe, plan.facts(recipe))
    head = objective.exported.model.head
    assert objective.head is None and objective.average is None
    assert head.weight.shape == (1000, 768) and not head.weight.any() and not head.bias.any()


@pytest.mark.parametrize(
    ("name", "at", "lr", "decay"),
    [
        ("mae-vit-b", 0.0125, 1.2e-3, 0.05),  # half of the warm-up
        ("mae-vit-b", 0.5125, 1.2e-3, 0.05),  # half of the cosine
        ("mae-vit-b", 1.0, 0.0, 0.05),
        ("dino-vit-s16", 0.0125, 2e-3, 0.04014),
        ("dino-vit-s16", 0.5, None, 0.22),
        ("dino-vit-s16", 1.0, 1e-5, 0.4),
        ("deit-s", 5 / 300, 1e-3, 0.05),
        ("deit-s", 1.0, 1e-5, 0.05),
        ("vit-finetune-b16", 0.0125, 0.015, 0.0),
        ("vit-finetune-b16", 1.0, 0.0, 0.0),
    ],
)
def test_schedules_at_fixed_steps(name, at, lr, decay):
    recipe, optimizer, group_of = groups_of(f"imagenet/{name}")
    peak, total = recipe.learning_rate()[0], 100_000
    found = optim.set_schedule(optimizer, recipe.optim, peak, min(round(at * total), total - 1), total)
    assert lr is None or found == pytest.approx(lr, rel=2e-3, abs=1e-9)
    assert group_of["backbone.model.blocks.0.mlp.fc1.weight"]["weight_decay"] == pytest.approx(decay, rel=1e-3)


@pytest.mark.parametrize(("name", "rate"), [("deit-b", 0.1), ("mae-finetune-vit-h", 0.3), ("mae-vit-b", 0.0)])
def test_drop_path_rises_linearly(name, rate):
    _, objective = objective_of(f"imagenet/{name}")
    blocks = objective.backbone.model.blocks
    found = [getattr(block.drop_path2, "rate", 0.0) for block in blocks]
    assert found == pytest.approx([rate * i / (len(blocks) - 1) for i in range(len(blocks))])


# -- --plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.stem for path in recipes.shipped() if not path.stem.endswith("-photos")])
def test_a_plan_is_what_a_run_would_be(name, monkeypatch):
    """Its parameters, FLOPs and steps, found without memory for the weights."""
    recipe = asked(name)
    found = plan.make(recipe, pretrain.build)
    other = asked(name)
    images = plan.facts(other)
    objective = pretrain.build(other, images)
    steps, per_image = flops.budget(other, objective, len(images))
    assert (found.steps, found.flops_per_image) == (steps, per_image)
    assert found.parameters == sum(p.numel() for p in objective.exported.parameters())
    assert found.per_device * found.accumulation == recipe.train.batch_size


def test_memory_decides_the_micro_batches():
    recipe = asked("imagenet/mae-vit-h")
    small, large = (plan.make(asked("imagenet/mae-vit-h"), pretrain.build, 8, gpu) for gpu in ("A100", "H200"))
    for found, memory in ((small, 80), (large, 141)):
        assert found.memory < 0.9 * memory and found.per_device * found.accumulation * 8 >= recipe.train.batch_size
    assert small.accumulation > large.accumulation > 0
    assert small.hours / large.hours == pytest.approx(989 / 312)
    total = small.flops_per_image * small.steps * 4096
    assert small.hours == pytest.approx(total / (312e12 * 0.35 * 8) / 3600)
    assert small.disk == pytest.approx(4e-9 * (6 * small.trained + 2 * small.frozen + small.parameters))


def test_a_plan_knows_the_units_of_the_gpu():
    """A T4 and a V100 train in float32, which keeps twice the bytes; so does any GPU that is told to."""
    half, full, tf32, old = (
        plan.make(asked("imagenet/mae-vit-b", *settings), pretrain.build, 8, gpu)
        for settings, gpu in (
            ([], "A100"),
            (["train.precision=fp32"], "A100"),
            (["train.precision=tf32"], "A100"),
            ([], "V100"),
        )
    )
    assert [found.precision for found in (half, full, tf32, old)] == ["bf16", "fp32", "tf32", "fp32"]
    assert full.hours / half.hours == pytest.approx(312 / 19.5) and tf32.hours / half.hours == pytest.approx(2)
    assert old.hours / half.hours == pytest.approx(312 / 15.7)
    fixed = 16e-9 * half.trained + 4e-9 * half.frozen
    copies = 2e-9 * half.trained  # autocast's, in bf16
    own = half.memory - fixed - copies
    assert (full.memory - fixed) / full.per_device == pytest.approx(2 * own / half.per_device)
    small = ["runtime.engine=fsdp2", "runtime.per_device_batch_size=1"]
    sharded, recomputed = (
        plan.make(asked("imagenet/mae-vit-b", *small, *more), pretrain.build, 8, "A100").memory
        for more in ([], ["runtime.activation_checkpointing=true"])
    )
    assert sharded == pytest.approx(fixed / 8 + copies + own / half.per_device)
    assert fixed / 8 < recomputed < fixed / 8 + copies
    again = plan.make(asked("imagenet/mae-vit-b", "runtime.activation_checkpointing=true"), pretrain.build, 8, "A100")
    assert again.memory < half.memory / 3 and again.hours == pytest.approx(half.hours * 4 / 3)


def test_a_plan_refuses_what_a_run_refuses(tmp_path, monkeypatch):
    def planned(*words, gpu="A100", devices=1):
        return plan.make(objectives.read_recipe(words[0], list(words[1:]), "digits"), pretrain.build, devices, gpu)

    with pytest.raises(
        UserError, match="groups of 2 images.*a process has 3: set train.batch_size to a multiple of 16"
    ):
        planned("deit", "objective.mixup=0.8", "train.batch_size=24", devices=8)
    with pytest.raises(UserError, match="use_bn_in_head=true needs the whole batch of 256 at once"):
        planned("dino", "objective.use_bn_in_head=true", "runtime.per_device_batch_size=16")
    with pytest.raises(UserError, match="A T4 has no units for train.precision=bf16: take fp32"):
        planned("mae", "train.precision=bf16", gpu="T4")
    with pytest.raises(UserError, match="Name a larger --gpu, or more of them"):
        recipe = asked("imagenet/mae-vit-h", "backbone.depth=64", "runtime.engine=fsdp2")
        plan.make(recipe, pretrain.build, 1, "T4")

    def learner(recipe, images):
        objective = pretrain.build(recipe, images)
        objective.inherited = {"a tokenizer": 2e12}
        return objective

    with pytest.raises(UserError, match="is spent already: a tokenizer took 2e.12"):
        plan.make(objectives.read_recipe("mae", ["train.flops=1e12"], "digits"), learner)
    loaded = plan.facts(objectives.read_recipe("supervised", ["data.subset=20"], "digits"))
    loaded.labels[:100] = -1
    monkeypatch.setattr(plan, "facts", lambda recipe: loaded)
    recipe = objectives.read_recipe("supervised", ["train.epochs=10", "train.batch_size=20"], "digits")
    recipe.add_dataset_info(loaded.info())
    assert plan.make(recipe, pretrain.build).steps == 50  # of the 100 images that have a label


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "B100"], "Unknown GPU 'B100'.*Give one of T4, V100"),
        (["--gpu", "5xA100"], "train.batch_size=4096 is not divisible by 5 devices"),
        (["--gpu", "T4", "backbone.depth=64"], "mae-vit-h does not fit on a T4 of 16 GB: .*Shard it"),
    ],
)
def test_plans_that_cannot_be_are_one_sentence(arguments, said, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--recipe", "imagenet/mae-vit-h", "--plan", *arguments])
    with pytest.raises(pretrain.UserError, match=said):
        pretrain.main()


def test_plan_prints_and_does_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--recipe", "imagenet/mae-vit-b", "--plan", "--gpu", "8xA100"])
    assert pretrain.main() == 0
    said = capsys.readouterr().out
    for words in (
        "85.80 M in the backbone, 111.66 M trained",
        "197 (image)",
        "4096 = 8 x ",
        "500,456 steps = 1600 epochs",
    ):
        assert words in said
    assert "0.0024 (0.00015 · B/256 with B = 4096)" in said and "at 35% of the peak" in said
    assert list(tmp_path.iterdir()) == [] and max(map(len, said.splitlines())) < 120


def test_a_plan_starts_from_a_file_of_weights(monkeypatch, capsys, tmp_path):
    """Whose positions are compared with MAE's, while the model that takes them has no memory."""
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.pth")
    start = f"--init-from={tmp_path / 'vit.pth'},mean=imagenet,std=imagenet"
    settings = ["backbone.name=vit_tiny_patch16_224", "data.img_size=224", "data.in_chans=3"]
    settings += [f"backbone.{key}=null" for key in ("embed_dim", "depth", "num_heads", "pos_embed")][:3]
    words = ["pretrain.py", "--recipe", "imagenet/mae-vit-b", "--plan", start, *settings, "backbone.pos_embed=learned"]
    monkeypatch.setattr("sys.argv", words)
    assert pretrain.main() == 0 and "5.52 M in the backbone" in capsys.readouterr().out


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.matrix) if n not in SOME else n for n in PUBLISHED])
def test_a_header_states_what_the_recipe_costs(name):
    """With the teacher that its command names, whose weights a plan does not fetch."""
    text = recipes.find(name).read_text()
    command = next(line for line in text.splitlines() if f"--recipe {name}" in line)
    given = [word for word in command.split() if "=" in word and not word.endswith("=RUN")]
    found = plan.make(asked(name, *given), pretrain.build, 8) if given else of(name)
    line = next(line for line in text.splitlines() if line.startswith("# Cost: "))
    assert f"; {found.flops_per_image / 1e9:.3g} GFLOP per image." in line
    stated = line.removeprefix("# Cost: about ").split(" on ")[0].split()
    hours = float(stated[0].replace(",", "")) * dict(min=1 / 60, hours=1, days=24)[stated[1]]
    assert math.isclose(hours, found.hours, rel_tol=0.05)
    assert "# Expect: " in text and "# Source: " in text and f"--recipe {name}" in text


def test_beit_masks_75_patches():
    recipe = asked("imagenet/beit-vit-b")
    assert corruption.num_masked(196, recipe.objective.mask_ratio) == 75


def test_a_plan_says_what_it_assumes(monkeypatch, capsys):
    words = ["pretrain.py", "--recipe", "mae", "--data", "cifar10", "--plan"]
    assumed = "on 1 x A100 (assumed), in bf16"
    for given, said in (([], assumed), (["--gpu", "B200"], "on 1 x B200, in")):
        monkeypatch.setattr("sys.argv", [*words, *given])
        assert pretrain.main() == 0
        out = capsys.readouterr().out
        assert said in out and "if loading takes no time" in out and max(map(len, out.splitlines())) < 120
    with pytest.raises(UserError, match="Unknown GPU '8xB300'. Did you mean 'B200'"):
        plan.parse("8xB300")


@pytest.mark.parametrize("spoil", [lambda x: x.sum().item(), lambda x: torch.cov(x.flatten(1))])
def test_a_plan_refuses_an_objective_that_reads_values(spoil):
    def reader(recipe, images):
        objective = pretrain.build(recipe, images)
        forward = objective.forward
        objective.forward = lambda batch: spoil(batch.views["image"]) or forward(batch)
        return objective

    with pytest.raises(UserError, match="What .* would cost cannot be counted, since it reads the values of tensors"):
        plan.make(objectives.read_recipe("mae", [], "cifar10"), reader)
