"""Parameter groups, schedules and clipping do what their names say."""

import pytest
import torch
from conftest import make_batch, small_objective

from ssl_vit import flops, optim
from ssl_vit.recipe import Optim


def test_layer_decay_gives_each_block_its_own_rate():
    objective = small_objective("supervised", "backbone.depth=3")
    scales = optim.layer_scales(objective, 0.5)
    model = "backbone.model."
    assert scales[model + "head.weight"] == 1.0
    assert scales[model + "blocks.2.attn.qkv.weight"] > scales[model + "blocks.1.attn.qkv.weight"]
    assert scales[model + "blocks.1.mlp.fc1.bias"] == 2 * scales[model + "blocks.0.mlp.fc1.bias"]
    assert scales[model + "patch_embed.proj.weight"] == 0.5 * scales[model + "blocks.0.norm1.weight"]
    assert scales[model + "cls_token"] == scales[model + "pos_embed"] == scales[model + "patch_embed.proj.weight"]

    optimizer = optim.build(objective, Optim(layer_decay=0.5), 1.0)
    optim.set_schedule(optimizer, Optim(layer_decay=0.5, warmup=0.0), 1.0, 0, 10)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) >= 4 and max(rates) == 1.0
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == sum(p.requires_grad for p in objective.parameters())


def test_a_head_outside_of_the_backbone_is_not_slowed():
    objective = small_objective("mae")
    scales = optim.layer_scales(objective, 0.5)
    assert not any(name.startswith("decoder") for name in scales)
    assert scales["backbone.model.blocks.1.norm1.weight"] == 0.5


@pytest.mark.parametrize("rule", ["1d", "1d+tokens"])
def test_what_decays(rule):
    objective = small_objective("simmim", "backbone.positions=learned")
    decayed = {n for n, p in objective.named_parameters() if optim.decays(n, p, rule)}
    assert "backbone.model.blocks.0.mlp.fc1.weight" in decayed
    assert not any(n.endswith(".bias") or "norm" in n for n in decayed)
    assert ("mask_token" in decayed) == ("backbone.model.cls_token" in decayed) == (rule == "1d")
    optimizer = optim.build(objective, Optim(no_decay=rule), 1.0)
    optim.set_schedule(optimizer, Optim(weight_decay=0.3), 1.0, 0, 10)
    found = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    assert found == {id(p) for n, p in objective.named_parameters() if n in decayed and p.requires_grad}


def test_the_schedule_warms_up_and_ends():
    config = Optim(warmup=0.2, min_lr=0.1, weight_decay=0.04, weight_decay_end=0.4)
    optimizer = optim.build(small_objective("mae"), config, 1.0)
    rates, decays = [], []
    for step in range(20):
        rates.append(optim.set_schedule(optimizer, config, 1.0, step, 20))
        decays.append(max(g["weight_decay"] for g in optimizer.param_groups))
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[-1] == pytest.approx(0.1) and all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert decays[0] == pytest.approx(0.04) and decays[-1] == pytest.approx(0.4)


def test_clipping_global_and_per_parameter():
    def gradients(mode):
        weights = [
            torch.nn.Parameter(torch.zeros(3)),
            torch.nn.Parameter(torch.zeros(4)),
            torch.nn.Parameter(torch.zeros(2)),
        ]
        for weight, scale in zip(weights, (10.0, 0.1, 100.0), strict=True):
            weight.grad = torch.full_like(weight, scale)
        norm = optim.clip(weights, Optim(clip=3.0, clip_mode=mode))
        return norm, [w.grad for w in weights]

    norm, clipped = gradients("global")
    total = (300.0 + 0.04 + 20000.0) ** 0.5
    assert norm.item() == pytest.approx(total)
    assert torch.stack([g.norm() for g in clipped]).norm().item() == pytest.approx(3.0, rel=1e-4)
    norm, clipped = gradients("parameter")
    assert norm.item() == pytest.approx(total)
    assert [g.norm().item() for g in clipped] == pytest.approx([3.0, 0.2, 3.0], rel=1e-4)


@pytest.mark.parametrize("name", ["mae", "dino", "supervised"])
def test_counted_flops_follow_from_the_shapes(name):
    """Against the sum over the layers, written out: forward, and twice that backward but for the first layer."""
    objective = small_objective(name, *(["objective.local_count=0"] if name == "dino" else []))
    counted = flops.per_image(objective, 3, objective.labelled)
    d, n, patch = 16, 64, 2 * 2 * 3

    def blocks(tokens, width, depth):
        per = 2 * tokens * width * width * (3 + 1 + 4 + 4) + 2 * 2 * tokens * tokens * width
        return depth * per

    embed = 2 * n * patch * d  # the images need no gradient: 2x in all instead of 3x
    if name == "mae":
        decoder = 2 * 17 * d * 16 + blocks(65, 16, 1) + 2 * 65 * 16 * patch
        expected = 2 * embed + 3 * (blocks(17, d, 2) + decoder)
    elif name == "supervised":
        expected = 2 * embed + 3 * (blocks(65, d, 2) + 2 * d * 5)
    else:
        head = 2 * (d * 16 + 16 * 16 + 16 * 8 + 8 * 32)
        forward = embed + blocks(65, d, 2)
        loss = 2 * (2 * 2 * 32) * 2  # the pairs of views, forward, and backward into the student
        expected = 2 * (2 * embed + 3 * blocks(65, d, 2) + 3 * head) + 2 * (forward + head) + loss
    assert counted == pytest.approx(expected, rel=0.01)


def test_counting_touches_nothing():
    objective = small_objective("dino")
    before = {n: t.clone() for n, t in [*objective.named_parameters(), *objective.named_buffers()]}
    flops.per_image(objective, 3, False)
    for name, tensor in [*objective.named_parameters(), *objective.named_buffers()]:
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None
    batch = make_batch(objective, torch.arange(4))
    assert objective(batch)["loss"].isfinite()
