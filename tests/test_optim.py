"""Parameter groups, schedules and clipping do what their names say."""

import math

import pytest
import timm
import torch
from conftest import make_batch, small_objective

from ssl_vit import backbones, flops, objectives, optim
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
    optim.set_schedule(optimizer, Optim(layer_decay=0.5, warmup_fraction=0.0), 1.0, 0, 10)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert len(rates) >= 4 and max(rates) == 1.0
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == sum(p.requires_grad for p in objective.parameters())


@pytest.mark.parametrize("classes", [0, 5])
def test_layers_are_those_of_the_official_code(classes):
    """get_layer_id_for_vit in mae/util/lr_decay.py, its ids for three blocks written by hand."""
    model = small_objective("supervised", "backbone.depth=3").backbone.model
    model.reset_classifier(classes)
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    expected = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}
    expected |= {f"blocks.{i}.{part}.{kind}": i + 1 for i in range(3) for part in block for kind in ("weight", "bias")}
    expected |= {"norm.weight": 4, "norm.bias": 4}
    expected |= {"head.weight": 4, "head.bias": 4} if classes else {}
    assert optim.layer_ids(model) == (expected, 4)


def test_the_layers_of_other_models_end_with_their_head():
    for name, stem, block, head in (
        ("resnet18", "conv1.weight", "layer4.1.conv2.weight", "fc.weight"),
        ("convnext_atto", "stem.0.weight", "stages.3.blocks.1.mlp.fc2.weight", "head.fc.weight"),
    ):
        for classes in (0, 3):
            layers, last = optim.layer_ids(timm.create_model(name, num_classes=classes))
            assert layers[stem] == 0 and layers[block] == last - 1 and layers.get(head, last) == last, name


@pytest.mark.parametrize(
    ("name", "with_it"), [("hrnet_w18_small", "conv2.weight"), ("mobilenetv2_050", "conv_head.weight")]
)
def test_the_second_norm_is_in_the_stem_or_behind_the_last_block(name, with_it):
    """Of HRNet, and of models whose head has a convolution."""
    with torch.device("meta"):
        layers, last = optim.layer_ids(timm.create_model(name, num_classes=3))
    assert layers["bn2.weight"] == layers[with_it] and (layers["bn2.weight"] == last) == ("head" in with_it)


@pytest.mark.parametrize("name, spared", [
    ("finetune", True), ("supervised", True), ("simmim", True), ("beit", True), ("masked-patch", True),
    ("mae", False), ("mae-photos", False), ("dino", False), ("dino-photos", False),
])  # fmt: skip
def test_recipes_spare_positions_and_tokens_where_their_source_does(name, spared):
    """MAE's and DINO's pre-training decay the class token; what follows BEiT's and DeiT's optimizers does not."""
    rule = objectives.read_recipe(name, [], None).optim.no_weight_decay
    assert optim.decays("backbone.model.cls_token", torch.zeros(1, 1, 8), rule) != spared


def test_tokens_are_spared_as_by_timm():
    """Every parameter that the models themselves exempt (`no_weight_decay`) and that is none of one dimension."""
    small = dict(num_classes=0, depth=1, embed_dim=8, num_heads=1)
    models = {
        "vit_tiny_patch16_224": small | dict(reg_tokens=2),
        "deit_tiny_distilled_patch16_224": small,
        "swin_tiny_patch4_window7_224": dict(num_classes=0, depths=(1, 1), embed_dim=8, num_heads=(1, 1)),
        "swinv2_tiny_window8_256": dict(num_classes=0, depths=(1, 1), embed_dim=8, num_heads=(1, 1)),
        "vit_small_patch16_rope_mixed_224": dict(num_classes=0, depth=1, embed_dim=64, num_heads=1),
        "xcit_nano_12_p8_224": dict(num_classes=0, depth=1, embed_dim=8, num_heads=2),
    }
    words = ("relative_position_bias", "cpb_mlp", "logit_scale", "temperature")  # as the official code of Swin, of XCiT
    for name, args in models.items():
        model = timm.create_model(name, **args)
        exempt = model.no_weight_decay() | {n for n, _ in model.named_parameters() if any(word in n for word in words)}
        plain = {n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(".bias")}
        decayed = {n for n, p in model.named_parameters() if optim.decays(n, p, "1d+tokens")}
        assert plain - decayed == plain & (exempt | {"reg_token"}) != set(), name


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224", "vit_srelpos_small_patch16_224"]
)
def test_positions_that_blocks_share_are_of_the_stem(name, head):
    """Else they would be a layer of their own, and every block a layer further from the head."""
    layers, last = optim.layer_ids(timm.create_model(name, depth=3, num_classes=head))
    assert last == 4 and {layers[f"blocks.{i}.mlp.fc1.weight"] - i for i in range(3)} == {1}
    shared = {layer for key, layer in layers.items() if key.startswith(("rope", "shared_rel_pos", "patch_embed"))}
    assert shared == {0} and {layer for key, layer in layers.items() if key.startswith("head")} <= {4}


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_base_patch16_clip_224"])
def test_tokens_and_a_first_norm_are_of_the_stem_whatever_timm_says(name, monkeypatch):
    """Its pattern leaves out registers up to 1.0.27 and norm_pre up to 1.0.30, and puts both behind the last block."""
    model = timm.create_model(name, depth=3, num_classes=3, reg_tokens=4)
    older = dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])
    monkeypatch.setattr(model, "group_matcher", lambda coarse: older)
    layers, last = optim.layer_ids(model)
    assert last == 4 and {layers[f"blocks.{i}.mlp.fc1.weight"] - i for i in range(3)} == {1}
    assert {layers[key] for key in layers if key.startswith(("cls", "reg", "pos", "norm_pre", "patch_embed"))} == {0}


def test_a_pool_behind_the_blocks_is_of_the_last_layer():
    layers, last = optim.layer_ids(timm.create_model("naflexvit_base_patch16_siglip", depth=2, embed_dim=96))
    assert last == 3 and {layers[key] for key in layers if key.startswith(("norm", "attn_pool"))} == {3}


def test_a_head_outside_of_the_backbone_is_not_slowed():
    objective = small_objective("mae")
    scales = optim.layer_scales(objective, 0.5)
    assert not any(name.startswith("decoder") for name in scales)
    assert scales["backbone.model.blocks.1.norm1.weight"] == 0.5


@pytest.mark.parametrize("rule", ["1d", "1d+tokens"])
def test_what_decays(rule):
    objective = small_objective("simmim", "backbone.pos_embed=learned")
    decayed = {n for n, p in objective.named_parameters() if optim.decays(n, p, rule)}
    assert "backbone.model.blocks.0.mlp.fc1.weight" in decayed
    assert not any(n.endswith(".bias") or "norm" in n for n in decayed)
    assert ("mask_token" in decayed) == ("backbone.model.cls_token" in decayed) == (rule == "1d")
    optimizer = optim.build(objective, Optim(no_weight_decay=rule), 1.0)
    optim.set_schedule(optimizer, Optim(weight_decay=0.3), 1.0, 0, 10)
    found = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    assert found == {id(p) for n, p in objective.named_parameters() if n in decayed and p.requires_grad}


def line_and_half_cosine(step, total, warmup, peak, end):
    """Linear warm-up to the peak in so many steps, then half a cosine that ends at the last step (MAE, table 8)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - 1 - warmup))) / 2


@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("decay", [(0.05, None), (0.04, 0.4), (0.3, 0.0)])
def test_the_whole_course_of_learning_rate_and_weight_decay(warmup, decay):
    """Every step of every group: DINO's weight decay rises on half a cosine, without warm-up."""
    start, end = decay
    config = Optim(warmup_fraction=warmup, min_lr=0.1, weight_decay=start, weight_decay_end=end, layer_decay=0.5)
    objective = small_objective("supervised")
    optimizer = optim.build(objective, config, 2.0)
    name = {id(p): n.removeprefix("backbone.model.") for n, p in objective.named_parameters()}
    for step in range(20):
        rate = line_and_half_cosine(step, 20, 20 * warmup, 2.0, 0.1)
        weight = start if end is None else end + (start - end) * (1 + math.cos(math.pi * step / 19)) / 2
        assert optim.set_schedule(optimizer, config, 2.0, step, 20) == pytest.approx(rate, rel=1e-12)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                own = name[id(parameter)]
                below = 0 if own.startswith(("head.", "norm.")) else 1 if own.startswith("blocks.1.") else 2
                below = 3 if own.startswith(("patch_embed.", "pos_embed", "cls_token")) else below
                assert group["lr"] == pytest.approx(rate * 0.5**below, rel=1e-12), own
                plain = parameter.ndim > 1 and not own.endswith(".bias")
                assert group["weight_decay"] == pytest.approx(weight if plain else 0.0, rel=1e-12), own


@pytest.mark.parametrize("name", ["dino", "mae", "supervised"])
def test_the_whole_course_of_the_averaged_weights(name):
    """At every step the average moves by this step's momentum: DINO's and data2vec's rise on half a cosine to 1, that
    of TensorFlow's moving average by (1 + t) / (10 + t)."""
    settings = {
        "dino": ["objective.momentum_teacher=0.9"],
        "mae": ["objective.target=features", "objective.encoder_input=mask_token", "objective.momentum_teacher=0.9"],
        "supervised": ["objective.model_ema_decay=0.5"],
    }
    objective = small_objective(name, "backbone.drop_path_rate=0", *settings[name])
    pairs = {
        "dino": lambda: [(objective.teacher, objective.backbone), (objective.teacher_head, objective.head)],
        "mae": lambda: [(objective.teacher, objective.backbone)],
        "supervised": lambda: [(objective.average, objective.backbone)],
    }[name]()
    weights = [[list(module.parameters())[0] for module in pair] for pair in pairs]
    if name == "dino":
        objective.teacher_count += 1
    for step in range(12):
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / 11)) / 2
        if name == "supervised":
            momentum = min(0.5, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, weight in weights:
                average.zero_(), weight.fill_(1.0)
        objective.on_optimizer_step(step, 12, lambda t: t)
        for average, _ in weights:
            assert average.flatten()[0].item() == pytest.approx(1 - momentum, abs=1e-6), step


def test_the_whole_course_of_dino_s_temperature_and_frozen_prototypes():
    """The teacher's temperature rises on a line over the first 30 % of the steps; the prototypes stay for 20 %."""
    objective = small_objective(
        "dino",
        "objective.warmup_teacher_temp=0.02",
        "objective.teacher_temp=0.07",
        "objective.warmup_teacher_temp_fraction=0.3",
        "objective.freeze_last_layer_fraction=0.2",
    )
    for step in range(20):
        expected = 0.02 + 0.05 * min(step / 6, 1.0)
        assert objective.teacher_temp(step, 20) == pytest.approx(expected, rel=1e-12)
        objective.zero_grad()
        result = objective(make_batch(objective, torch.arange(4), step=step, total=20))
        result["loss"].backward()
        objective.before_optimizer_step(step, 20)
        assert (objective.head.last.direction.grad is None) == (step < 4), step
        # and it is the temperature of the loss: the entropy is that of the teacher's softmax by it
        batch = make_batch(objective, torch.arange(4), step=step, total=20)
        two = torch.cat([batch.views["global1"], batch.views["global2"]])
        with torch.no_grad():
            p = ((objective.teacher_head(objective.teacher(two)[:, 0]) - objective.center) / expected).softmax(-1)
        assert result["teacher_entropy"].item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)


def test_adamw_is_its_formula():
    """Decoupled weight decay and moments with bias correction (arXiv 1711.05101, algorithm 2), in float64."""
    config = Optim(betas=[0.6, 0.8], weight_decay=0.1, warmup_fraction=0.0)
    objective = small_objective("supervised").double()
    optimizer = optim.build(objective, config, 0.01)
    named = dict(objective.named_parameters())
    expected = {name: weight.detach().clone() for name, weight in named.items()}
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in named.items()}
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 4):
        optim.set_schedule(optimizer, config, 0.01, 0, 10)
        for name, weight in named.items():
            g = weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            m, v = (b * old + (1 - b) * new for b, old, new in zip((0.6, 0.8), moments[name], (g, g * g), strict=True))
            moments[name] = m, v
            shrunk = expected[name] * (1 - 0.01 * 0.1 * (weight.ndim > 1))
            expected[name] = shrunk - 0.01 * (m / (1 - 0.6**step)) / ((v / (1 - 0.8**step)).sqrt() + 1e-8)
        optimizer.step()
    for name, weight in named.items():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("frozen", [0, 4])
def test_sgd_is_its_formula(frozen):
    """v = 0.9 v + g + d w and w -= r v, in float64: with a warm-up and a cosine for each group, layer decay, weight
    decay of what decays, clipping, and a backbone that starts without momentum when its time comes."""
    decay, peak, total = 0.1, 0.5, 12
    config = Optim("sgd", momentum=0.9, weight_decay=decay, min_lr=0.01, warmup_fraction=0.25, layer_decay=0.5)
    config.clip_grad = 10.0
    objective = small_objective("supervised", "backbone.drop_path_rate=0").double()
    with torch.no_grad():
        objective.backbone.model.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    optimizer = optim.build(objective, config, peak, frozen)
    assert isinstance(optimizer, torch.optim.SGD) and not any(group["nesterov"] for group in optimizer.param_groups)
    weights = {n: p.detach().clone() for n, p in objective.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in weights.items()}
    clipped = []
    for step in range(total):
        objective.zero_grad()
        objective(make_batch(objective, torch.arange(8), step, total, torch.float64))["loss"].backward()
        optim.set_schedule(optimizer, config, peak, step, total)
        optim.drop_gradients(optimizer, step)
        learning = {n for n in weights if step >= frozen or ".head." in n}
        gradients = {n: p.grad.clone() for n, p in objective.named_parameters() if n in learning}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        clipped.append(norm > config.clip_grad)
        optim.clip(objective.parameters(), config)
        optimizer.step()
        for name in learning:
            own = name.removeprefix("backbone.model.")
            below = 0 if own.startswith(("head.", "norm.")) else 1 if own.startswith("blocks.1.") else 2
            below = 3 if own.startswith(("patch_embed.", "pos_embed", "cls_token")) else below
            start = 0 if ".head." in name else frozen
            rate = line_and_half_cosine(step - start, total - start, (total - start) / 4, peak, 0.01) * 0.5**below
            plain = weights[name].ndim > 1 and not own.endswith(".bias")
            pull = gradients[name] * min(1.0, config.clip_grad / (norm + 1e-6))
            velocity[name] = 0.9 * velocity[name] + pull + (decay if plain else 0.0) * weights[name]
            weights[name] = weights[name] - rate * velocity[name]
        for name, parameter in objective.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-9, atol=1e-12, msg=f"{step} {name}")
            assert ("momentum_buffer" in optimizer.state[parameter]) == (step >= frozen or ".head." in name)
    assert True in clipped and False in clipped


@pytest.mark.parametrize("settings, count", [(dict(), 2), (dict(name="sgd"), 1), (dict(name="sgd", momentum=0.0), 0)])
def test_what_an_optimizer_keeps_of_each_parameter(settings, count):
    weight = torch.nn.Linear(3, 2, bias=False)
    optimizer = optim.build(weight, Optim(**settings), 0.1)
    weight(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kept = [value for value in optimizer.state[weight.weight].values() if value is not None and value.numel() == 6]
    assert len(kept) == count == optim.moments(Optim(**settings))


def test_clipping_global_and_per_parameter():
    def gradients(mode):
        weights = [
            torch.nn.Parameter(torch.zeros(3)),
            torch.nn.Parameter(torch.zeros(4)),
            torch.nn.Parameter(torch.zeros(2)),
        ]
        for weight, scale in zip(weights, (10.0, 0.1, 100.0), strict=True):
            weight.grad = torch.full_like(weight, scale)
        norm = optim.clip(weights, Optim(clip_grad=3.0, clip_mode=mode))
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
    objective = small_objective(name, *(["objective.local_crops_number=0"] if name == "dino" else []))
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


def test_groups_are_right_before_the_first_schedule():
    optimizer = optim.build(small_objective("supervised"), Optim(weight_decay=0.3, layer_decay=0.5), 2.0)
    groups = optimizer.param_groups
    assert all(g["lr"] == 2.0 * g["lr_scale"] and g["weight_decay"] == (0.3 if g["decays"] else 0.0) for g in groups)
    assert {g["weight_decay"] for g in groups} == {0.0, 0.3} and len({g["lr"] for g in groups}) == 4


def test_layer_decay_asks_for_layers():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    with pytest.raises(
        ValueError, match="layer_decay=0.5 needs to know the layers: wrap the timm model with ssl_vit.back"
    ):
        optim.build(model, Optim(layer_decay=0.5), 1.0)
    optim.build(model, Optim(layer_decay=1.0), 1.0)
    wrapped = backbones.wrap(model, [0.5] * 3, [0.5] * 3, {})
    rates = {g["lr"] for g in optim.build(wrapped, Optim(layer_decay=0.5), 1.0).param_groups}
    assert rates == {1.0, 0.5, 0.25, 0.125}
