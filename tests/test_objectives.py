"""What every objective promises, whatever its loss."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_batch, small_objective
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit import corruption, objectives, reference, targets, views, weights
from ssl_vit.backbones import Backbone
from ssl_vit.errors import UserError
from ssl_vit.patches import patchify
from ssl_vit.randomness import Draw


def gradients(objective, parts, dtype=torch.float64):
    objective.zero_grad()
    objective.begin_step()
    rows = sum(map(len, parts))
    losses = []
    for part in parts:
        loss = objective(make_batch(objective, part, dtype=dtype))["loss"] * (len(part) / rows)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_of_64_equals_4_of_16(name):
    objective = small_objective(name).double()
    rows = torch.arange(64)
    whole, expected = gradients(objective, [rows])
    buffers = {n: b.clone() for n, b in objective.named_buffers()}
    parts, found = gradients(objective, list(rows.split(16)))
    assert parts == pytest.approx(whole, rel=1e-12)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        # timm resamples positions for local crops in float32, whatever the model's precision
        tolerance = (
            dict(rtol=1e-5, atol=1e-8) if name == "dino" and key.endswith("pos_embed") else dict(rtol=1e-9, atol=1e-12)
        )
        torch.testing.assert_close(found[key], value, **tolerance)
    for key, value in objective.named_buffers():
        torch.testing.assert_close(value, buffers[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_falls_and_nothing_global_is_drawn(name):
    objective = small_objective(name)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    state = torch.get_rng_state()
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        objective.begin_step()
        loss = objective(make_batch(objective, torch.arange(16), step=step % 2, total=30))["loss"]
        loss.backward()
        optimizer.step()
        objective.on_optimizer_step(step, 30, lambda t: t)
        losses.append(loss.item())
    if name != "dino":  # whose loss follows its teacher, up and down
        assert sum(losses[-4:]) < sum(losses[:4])
    assert torch.equal(torch.get_rng_state(), state)


WAYS = {  # into the encoder
    **{name: [name] for name in SMALL},
    "next patch": ["mae", "objective.mask=prefix", "objective.encoder_input=corrupted"],
    "features": ["mae", "objective.target=features"],
    "dropped patches": ["supervised", "objective.patch_drop_rate=0.5"],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_backbone_s_weights_are_used_inside_its_forward_alone(way):
    """As where they are sharded: outside of it there is nothing of them. A classifier is read behind it."""
    objective = small_objective(*WAYS[way])
    batch = make_batch(objective, torch.arange(4))
    expected = objective(batch)["loss"]
    for backbone in (m for m in objective.modules() if isinstance(m, Backbone)):
        heads = {"head", "head_dist"}
        weights = {p: p.data for name, p in backbone.named_parameters() if not heads & set(name.split("."))}

        def gather(*_, weights=weights):
            for p, value in weights.items():
                p.data = value

        def scatter(*_, weights=weights):
            for p, value in weights.items():
                p.data = torch.full_like(value, torch.nan)

        scatter()
        backbone.register_forward_pre_hook(gather)
        backbone.register_forward_hook(scatter)
    with torch.no_grad():
        assert torch.equal(objective(batch)["loss"], expected)


@pytest.mark.parametrize("name", ["mae", "simmim", "beit"])
def test_hidden_pixels_cannot_reach_the_encoder(name):
    objective = small_objective(name)
    batch = make_batch(objective, torch.arange(8))
    images = batch.views["image"]
    prediction, hidden, *_ = objective.predict(images, batch.draw)
    patch = objective.backbone.patch_size
    mask = hidden.view(8, 1, *objective.grid).repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
    assert torch.equal(objective.predict(torch.where(mask, torch.rand_like(images), images), batch.draw)[0], prediction)
    assert not torch.equal(objective.predict(torch.where(mask, images, 1 - images), batch.draw)[0], prediction)


@pytest.mark.parametrize(("name", "count"), [("mae", 48), ("simmim", 39), ("beit", 26)])
def test_every_image_hides_exactly_the_stated_number(name, count):
    objective = small_objective(name)
    batch = make_batch(objective, torch.arange(64))
    _, hidden, *_ = objective.predict(batch.views["image"], batch.draw)
    assert (hidden.sum(1) == count).all()
    assert len({tuple(row.tolist()) for row in hidden}) == 64


@pytest.mark.parametrize(
    ("patches", "ratio", "hidden"), [(196, 0.75, 147), (64, 0.75, 48), (196, 0.6, 118), (16, 0.4, 7)]
)
def test_hidden_counts_are_those_of_the_official_code(patches, ratio, hidden):
    assert corruption.num_masked(patches, ratio) == hidden


def test_dino_keeps_its_teacher_out_of_training():
    objective = small_objective("dino", "backbone.drop_path_rate=0.3").train()
    assert not objective.teacher.training and objective.backbone.training
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    assert objective.exported is objective.teacher
    objective(make_batch(objective, torch.arange(8)))["loss"].backward()
    objective.before_optimizer_step(0, 1000)
    assert all(p.grad is None for p in objective.head.last.parameters())
    objective.zero_grad()
    objective(make_batch(objective, torch.arange(8)))["loss"].backward()
    objective.before_optimizer_step(500, 1000)
    assert all(p.grad is not None for p in objective.head.last.parameters())


def test_dino_says_when_it_has_collapsed():
    objective = small_objective("dino")
    largest = torch.log(torch.tensor(32.0)).item()
    assert "uniform" in objective.alarm(dict(kl=0.001, teacher_entropy=largest * 0.999))
    assert "one and the same" in objective.alarm(dict(kl=0.001, teacher_entropy=0.001))
    assert objective.alarm(dict(kl=0.8, teacher_entropy=0.5 * largest)) is None


def test_a_naive_dino_on_constant_views_collapses_and_alarms():
    """Views that tell nothing leave only the collapsed solution: the logged scalars must show it."""
    objective = small_objective("dino", "objective.momentum_teacher=0.9", "objective.bottleneck_dim=64")
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    for step in range(200):
        batch = make_batch(objective, torch.arange(8), step=step, total=200)
        batch.views = {name: torch.full_like(view, 0.5) for name, view in batch.views.items()}
        objective.begin_step()
        optimizer.zero_grad()
        result = objective(batch)
        result["loss"].backward()
        optimizer.step()
        objective.on_optimizer_step(step, 200, lambda t: t)
    assert objective.alarm({k: v.item() for k, v in result.items()})


def test_supervised_starts_at_ln_k():
    objective = small_objective("supervised")
    loss = objective(make_batch(objective, torch.arange(16)))["loss"]
    assert loss.item() == pytest.approx(torch.log(torch.tensor(5.0)).item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_supervised_loss_is_torch_s(loss):
    settings = [f"objective.loss={loss}", "objective.mixup=0", "objective.cutmix=0", "objective.smoothing=0.1"]
    objective = small_objective("supervised", *settings).eval()
    torch.nn.init.normal_(objective.backbone.model.head.weight)
    batch = make_batch(objective, torch.arange(16))
    logits = objective.backbone.classify(batch.views["image"])
    if loss == "ce":
        expected = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, batch.labels)
    else:
        target = torch.nn.functional.one_hot(batch.labels, 5) * 0.9 + 0.02
        expected = torch.nn.BCEWithLogitsLoss()(logits, target)
    assert objective(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_both_classes_of_a_mixed_image_are_present():
    """DeiT III: engine.py of the official code sets the targets of mixed images that are above 0 to 1."""
    settings = ["objective.loss=bce", "objective.mixup=0.8", "objective.cutmix=1", "objective.smoothing=0.1"]
    objective = small_objective("supervised", *settings, "objective.mixup_mode=batch").eval()
    torch.nn.init.normal_(objective.backbone.model.head.weight)
    batch = make_batch(objective, torch.arange(16))
    there = torch.nn.functional.one_hot(batch.labels, 5).float()
    mixed, shares = views.mix(batch.views["image"], there, batch.draw, 0.8, 1.0, 1.0, "batch")
    present = torch.maximum(there, there.view(8, 2, 5).flip(1).view(16, 5))
    assert ((shares > 0) == (present > 0)).all() and (present.sum(1) == 2).any() and (shares.amax(1) < 0.99).any()
    expected = torch.nn.BCEWithLogitsLoss()(objective.backbone.classify(mixed), present * 0.9 + 0.02)
    assert objective(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_patches_that_are_all_dropped_are_refused():
    with pytest.raises(UserError, match="patch_drop_rate=0.99 drops all 64 patches"):
        small_objective("supervised", "objective.patch_drop_rate=0.99")


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_head_of_two_layers_is_the_vit_paper_s(pool, tmp_path):
    """In pre-training a hidden layer with tanh, then zeros; fine-tuning starts from zero, at a higher resolution, with
    positions interpolated in two dimensions (arXiv 2010.11929, sections 3.1 and 3.2)."""
    plain = [f"objective.{key}=0" for key in ("smoothing", "mixup", "cutmix")] + [f"objective.global_pool={pool}"]
    objective = small_objective("supervised", *plain, "objective.representation_size=7")
    batch = make_batch(objective, torch.arange(8))
    images = batch.views["image"]
    assert objective(batch)["loss"].item() == pytest.approx(math.log(5), rel=1e-6)
    hidden, _, last = objective.head
    torch.nn.init.normal_(last.weight, generator=torch.Generator().manual_seed(0))
    tokens = objective.backbone.model.forward_features(objective.backbone.normalise(images))
    pooled = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
    logits = (pooled @ hidden.weight.T + hidden.bias).tanh() @ last.weight.T + last.bias
    assert hidden.out_features == 7 and logits.std() > 0.1
    expected = torch.nn.functional.cross_entropy(logits, batch.labels)
    torch.testing.assert_close(objective(batch)["loss"], expected)

    weights.save(objective.exported, tmp_path / "run")
    exported = weights.load(str(tmp_path / "run"))
    assert exported.model.num_classes == 0
    larger = [*plain, "data.img_size=32", "backbone.patch_size=2", "backbone.drop_path_rate=0"]
    tuned = small_objective("supervised", *larger)
    weights.initialise(tuned.backbone, str(tmp_path / "run"))
    assert not tuned.classify(torch.rand(2, 3, 32, 32), Draw(0, 0, torch.arange(2))).any()
    old, new = (b.model.pos_embed.detach() for b in (exported, tuned.backbone))
    grids = [tuple(b.model.patch_embed.grid_size) for b in (exported, tuned.backbone)]
    assert grids[1] == (2 * grids[0][0], 2 * grids[0][1]) and torch.equal(new[:, :1], old[:, :1])
    square = old[:, 1:].unflatten(1, grids[0]).permute(0, 3, 1, 2)
    resampled = torch.nn.functional.interpolate(square, size=grids[1], mode="bicubic", antialias=True)
    torch.testing.assert_close(new[:, 1:], resampled.permute(0, 2, 3, 1).flatten(1, 2))


def test_a_head_of_two_layers_on_other_backbones():
    head = ["backbone.drop_path_rate=0", "objective.representation_size=7"]
    shape = [f"backbone.{key}=null" for key in ("embed_dim", "depth", "num_heads")]
    resnet = small_objective("supervised", "backbone.name=resnet10t", *shape, *head)
    assert resnet.head[0].in_features == 512 and resnet.backbone.model.num_classes == 0
    assert resnet(make_batch(resnet, torch.arange(8)))["loss"].item() == pytest.approx(math.log(5), rel=1e-6)
    with pytest.raises(UserError, match="has two heads of its own: set objective"):
        small_objective("supervised", "backbone.name=deit_tiny_distilled_patch16_224", *head)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["objective.mask_ratio=1"], "objective.mask_ratio"),
        (["objective.decoder_num_heads=3"], "decoder_num_heads"),
    ],
)
def test_impossible_reconstructions_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        small_objective("mae", *settings)


def test_colours_of_many_channels_are_refused():
    with pytest.raises(UserError, match="kmeans"):
        small_objective(
            "beit",
            "objective.target=colour",
            "data.in_chans=5",
            "data.mean=[.5,.5,.5,.5,.5]",
            "data.std=[.5,.5,.5,.5,.5]",
        )


@pytest.mark.parametrize("name", ["mae", "simmim", "beit", "masked-patch"])
def test_models_without_tokens_are_refused_by_name(name):
    with pytest.raises(UserError, match=r"which ssl_vit_resnet18 does not allow \(.*: use a recipe that"):
        small_objective(
            name, "backbone.name=resnet18", "backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null"
        )


def test_an_unknown_objective_is_refused():
    with pytest.raises(UserError, match="Did you mean 'dino'"):
        objectives.find("dinno")


def test_a_new_objective_is_one_file_and_one_recipe(tmp_path):
    """That of docs/architecture.md: its file beside ours, its recipe anywhere, its command, nothing else touched."""
    root = Path(objectives.__file__).parents[2]
    text = (root / "docs" / "architecture.md").read_text()
    [(name, code)] = re.findall(r"```python\n# (ssl_vit/objectives/\w+\.py)\n(.*?)```", text, re.DOTALL)
    [(recipe, command, settings)] = re.findall(r"```yaml\n# (\w+\.yaml); python (.*?)\n(.*?)```", text, re.DOTALL)
    for file in root.glob("ssl_vit/**/*.py"):
        copy = tmp_path / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(file)
    assert not (tmp_path / name).exists()
    (tmp_path / name).write_text(code)
    (tmp_path / recipe).write_text(settings)
    small = [
        "train.steps=3",
        "train.batch_size=16",
        "backbone.embed_dim=16",
        "backbone.depth=1",
        "backbone.num_heads=2",
    ]

    def ran(*words):
        options = dict(cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=120)
        result = subprocess.run([sys.executable, *command.split(), *small, *words], **options)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "FLOPs" in ran("--plan") and not (tmp_path / "run").exists()  # no value of a tensor is read
    ran("--output", "run")
    assert (tmp_path / "run" / "backbone" / "model.safetensors").exists()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] == pytest.approx(math.log(4), rel=0.5)  # of four turns


def environment(root: Path) -> dict[str, str]:
    import os

    return os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1")


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_s_settings_are_documented(name):
    """Each with a sentence of its own, which the page of all settings holds."""
    config = objectives.find(name).Config
    said = reference.page()
    helps = [field.metadata.get("help", "") for field in dataclasses.fields(config)]
    assert all(len(text.split()) >= 2 for text in helps) and len(set(helps)) == len(helps) > 0
    for field, text in zip(dataclasses.fields(config), helps, strict=True):
        assert f"| `objective.{field.name}` |" in said and f"| {text} |" in said, field.name


def test_batch_norm_in_the_head_requires_the_full_batch():
    assert small_objective("dino", "objective.use_bn_in_head=false").batch_statistics is None
    tied = small_objective("dino", "objective.use_bn_in_head=true")
    assert "use_bn_in_head" in tied.batch_statistics and tied.requires_full_batch is None
    rows = torch.arange(32)
    whole, _ = gradients(tied.double(), [rows])
    parts, _ = gradients(tied, list(rows.split(8)))
    assert abs(whole - parts) > 1e-3  # it does, which is why the loop refuses to cut it


@pytest.mark.parametrize("name", SMALL)
def test_bf16_autocast_changes_the_rounding_alone(name):
    objective = small_objective(name)
    batch = make_batch(objective, torch.arange(16))
    with torch.no_grad():
        expected = objective(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        result = objective(batch)
    assert all(value.dtype == torch.float32 for value in result.values())
    result["loss"].backward()
    assert result["loss"].item() == pytest.approx(expected.item(), rel=0.03)
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_tokens_are_the_nearest_centroids_and_their_flops_are_counted():
    target, images = targets.KMeans((4, 4), 3, 16), torch.rand(2, 3, 8, 8)
    target.centroids.copy_(torch.randn(16, 48))
    away = (patchify(images, (4, 4))[:, :, None] - target.centroids).norm(dim=-1)  # (2, 4, 16)
    assert target(images).tolist() == away.argmin(-1).tolist()
    with FlopCounterMode(display=False) as counter:
        target(images)
    assert counter.get_total_flops() == 2 * 2 * 4 * 16 * 48
