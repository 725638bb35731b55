"""The seam against timm itself: same features, in and out, whatever the size, grid or model."""

import json

import pytest
import timm
import torch
from conftest import small_objective, small_recipe
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from ssl_vit import backbones, objectives, overview, views, weights
from ssl_vit.backbones import timm_models
from ssl_vit.errors import UserError
from ssl_vit.models import local_vit
from ssl_vit.randomness import Draw

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(*settings: str) -> backbones.Backbone:
    recipe = small_recipe("mae", "backbone.pos_embed=learned", "backbone.weight_init=trunc_normal", *settings)
    return backbones.build(recipe.backbone, recipe.data, seed=0).eval()


def standardised(images):
    mean, std = torch.tensor([0.5, 0.45, 0.4]).view(3, 1, 1), torch.tensor([0.25, 0.2, 0.3]).view(3, 1, 1)
    return (images - mean) / std


SHAPELESS = ["backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null"]
VARIANTS = {
    "plain": [],
    "registers": ["backbone.reg_tokens=3"],
    "layer scale": ["backbone.init_values=0.1"],
    "drop path": ["backbone.drop_path_rate=0.5"],
    "sincos": ["backbone.pos_embed=sincos"],
    "distilled": ["backbone.name=deit_tiny_distilled_patch16_224"],
    "registers of the name": ["backbone.name=vit_small_patch14_reg4_dinov2", "backbone.patch_size=2"],
    "not square": ["data.img_size=[16, 24]", "backbone.patch_size=4"],
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_the_seam_equals_timm_s_forward(settings):
    b = build(*settings)
    images = torch.rand(2, 3, *b.input_size)
    for name, token in b.model.named_parameters():
        if name.endswith("token"):
            torch.nn.init.normal_(token)
    with torch.no_grad():
        expected = b.model.forward_features(standardised(images))
        torch.testing.assert_close(b(images), expected, rtol=0, atol=1e-6)
        [(prefix, patches)] = b.features(images)
    p = b.num_prefix_tokens
    torch.testing.assert_close(prefix, expected[:, :p], rtol=0, atol=1e-6)
    torch.testing.assert_close(patches.flatten(1, 2), expected[:, p:], rtol=0, atol=1e-6)
    assert patches.shape[1:3] == b.grid(images)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_backbone_loads_in_plain_timm(settings, tmp_path):
    b = build(*settings)
    weights.save(b, tmp_path / "backbone")
    images = torch.rand(2, 3, *b.input_size)
    plain = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(plain)
    assert config["mean"] == pytest.approx((0.5, 0.45, 0.4)) and config["std"] == pytest.approx((0.25, 0.2, 0.3))
    assert tuple(config["input_size"]) == (3, *b.input_size) and config["crop_pct"] == 1.0
    with torch.no_grad():
        assert torch.equal(plain.forward_features(standardised(images)), b.model.forward_features(standardised(images)))
        again = weights.load(str(tmp_path / "backbone")).eval()
        assert all(torch.equal(x, y) for x, y in zip(again.features(images)[0], b.features(images)[0], strict=True))


def same_view(b: backbones.Backbone, model: torch.nn.Module) -> None:
    """That what the backbone sees of an image, standardised, is what timm's own transform shows the model."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    noise = torch.rand(1, len(config["mean"]), 7, 9, generator=torch.Generator().manual_seed(0))
    for shape in ((90, 130), (131, 77), (13, 21)):
        image = (torch.nn.functional.interpolate(noise, shape, mode="bicubic").clamp(0, 1) * 255).byte()
        with Image.fromarray(image[0].permute(1, 2, 0).numpy()) as pil:
            expected = transform(pil)
        found = b.normalise(b.evaluation_view(image))[0]
        assert found.shape == expected.shape
        # a grey level, and half of one, as the transform rounds
        assert ((found - expected) * b.std).abs().max() < 1.5 / 255


PUBLISHED = [
    "vit_tiny_patch16_224",  # 0.9, bicubic
    "deit3_small_patch16_224",
    "resnet18.tv_in1k",  # 0.875, bilinear
    "convnext_atto",
    "eva02_tiny_patch14_224.mim_in22k",  # 1.0
    "vit_base_patch32_clip_quickgelu_224.openai",  # means of its own
    "mobilenetv3_small_050",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_evaluated_with_its_own_view(name, monkeypatch):
    model = timm.create_model(name, **(dict(depth=1) if name.startswith(("vit", "deit", "eva")) else {}))
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: model)  # as the published one, but for its weights
    b = weights.load(name)
    config, view = timm.data.resolve_model_data_config(model), b.evaluation_view
    assert (view.crop_pct, view.interpolation) == (config["crop_pct"], config["interpolation"])
    same_view(b, model)


def test_the_view_of_a_squashing_model_and_of_one_that_pads():
    for mode in ("squash", "border"):
        model = timm.create_model("resnet10t")
        model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": mode, "interpolation": "bilinear"}
        b = backbones.wrap(model, [0.5] * 3, [0.5] * 3, {})
        if mode == "squash":
            same = b.evaluation_view(torch.arange(256, dtype=torch.uint8).expand(1, 3, 20, 256))
            assert same.shape == (1, 3, 176, 176) and same[..., 0].max() < 0.07  # nearly all of its width is seen
        else:
            with pytest.raises(
                UserError, match="resnet10t is evaluated with crop_mode=border, and only center and squ"
            ):
                _ = b.evaluation_view


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "name, size, crop_pct",
    [("vit_tiny", 64, 1.0), ("vit_tiny", 96, 0.875), ("eva02_tiny_patch14_224", 224, 0.875), ("resnet10t", 48, 1.0)],
)
def test_our_own_view_goes_with_the_weights(name, size, crop_pct, interpolation, tmp_path):
    """Whatever the published model of the same architecture has; and plain timm shows the saved one the same."""
    settings = [f"backbone.{key}=null" for key in ("embed_dim", "depth", "num_heads")] if name != "vit_tiny" else []
    recipe = small_recipe("mae", f"backbone.name={name}", "backbone.patch_size=8", f"data.img_size={size}", *settings)
    b = backbones.build(recipe.backbone, recipe.data, 0, interpolation)
    weights.save(b, tmp_path / "b")
    again = weights.load(str(tmp_path / "b"))
    assert b.evaluation_view == again.evaluation_view == views.Evaluation((size, size), crop_pct, interpolation)
    same_view(again, timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True))


@pytest.mark.parametrize("init", ["trunc_normal", "xavier"])
def test_the_class_token_starts_as_in_the_official_code(init, monkeypatch):
    """Normal of std 0.02 (MAE, DINO, DeiT), by the seed, and no other weight knows of it."""

    def new(seed):
        recipe = small_recipe("mae", f"backbone.weight_init={init}", "backbone.embed_dim=768", "backbone.depth=1")
        return backbones.build(recipe.backbone, recipe.data, seed).model.state_dict()

    tokens = torch.stack([new(seed)["cls_token"].flatten() for seed in range(4)])
    assert (tokens.std(1) - 0.02).abs().max() < 0.002 and tokens.mean().abs() < 0.0015
    assert tokens.abs().max() > 0.05  # not cut at two deviations
    assert (torch.corrcoef(tokens) - torch.eye(4)).abs().max() < 0.15
    first = new(0)
    assert torch.equal(new(0)["cls_token"], first["cls_token"])
    monkeypatch.setattr(backbones.factory, "draw_class_token", lambda model, seed: None)
    plain = new(0)
    assert [key for key in first if not torch.equal(first[key], plain[key])] == ["cls_token"]


def test_a_saved_config_says_nothing_of_the_published_model(tmp_path):
    weights.save(build(), tmp_path / "backbone")
    facts = json.loads((tmp_path / "backbone" / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "origin_url"} & facts.keys()
    assert facts["interpolation"] == "bilinear"


def test_a_saved_classifier_gives_the_same_logits(tmp_path):
    for pool in ("token", "avg"):
        b = build()
        b.add_classifier(7, pool)
        torch.nn.init.normal_(b.model.head.weight)
        weights.save(b, tmp_path / pool)
        plain = timm.create_model(f"local-dir:{tmp_path / pool}", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(standardised(IMAGES)), b.classify(IMAGES), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_other_timm_models_have_features_too(name, tmp_path):
    b = build(
        f"backbone.name={name}",
        "backbone.embed_dim=null",
        "backbone.depth=null",
        "backbone.num_heads=null",
        "data.img_size=64",
    )
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        [(prefix, patches)] = b.features(images)
        expected = b.model.forward_features(standardised(images))
    assert prefix.shape == (2, 0, b.embed_dim)
    torch.testing.assert_close(patches.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)
    weights.save(b, tmp_path / "b")
    again = weights.load(str(tmp_path / "b")).eval()
    assert torch.equal(again.features(images)[0][1], patches)


RELPOS = pytest.mark.skipif(not timm.is_model("test_vit_relpos"), reason="timm has it from 1.0.31 on")


@pytest.mark.parametrize(
    "name", ["swinv2_tiny_window8_256", "vit_tiny_r_s16_p8_224", pytest.param("test_vit_relpos", marks=RELPOS)]
)
def test_a_model_of_fixed_size_is_told_the_images_and_trains_without_unaddressed_draws(name):
    b = build(f"backbone.name={name}", *SHAPELESS, "data.img_size=64")
    b.add_classifier(5)
    images = torch.rand(2, 3, 64, 64)
    state = torch.get_rng_state()
    logits = b.train().classify(images, Draw(0, 0, torch.arange(2)))
    logits.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)  # a swin's published stochastic depth is 0.1
    assert torch.equal(logits, torch.zeros(2, 5))


def test_registers_are_those_of_the_name_unless_they_are_set():
    name = ["backbone.name=vit_small_patch14_reg4_dinov2", "backbone.patch_size=2"]
    for settings, registers in (([], 4), (["backbone.reg_tokens=0"], 0), (["backbone.reg_tokens=2"], 2)):
        assert build(*name, *settings).model.num_reg_tokens == registers
    with pytest.raises(UserError, match="takes no registers: set backbone.reg_tokens=null"):
        build("backbone.name=deit_tiny_distilled_patch16_224", "backbone.reg_tokens=2")


def test_a_distilled_deit_trains_both_heads(tmp_path):
    b = build("backbone.name=deit_tiny_distilled_patch16_224")
    with pytest.raises(UserError, match="use objective.global_pool=token"):
        b.add_classifier(7, "avg")
    b.add_classifier(7)
    assert torch.equal(b.classify(IMAGES), torch.zeros(2, 7))
    for head in b.model.get_classifier():
        torch.nn.init.normal_(head.weight)
    b.train().classify(IMAGES, Draw(0, 0, torch.arange(2))).square().sum().backward()
    assert b.model.dist_token.grad.abs().max() > 0 and b.model.head_dist.weight.grad.abs().max() > 0
    weights.save(b, tmp_path / "b")
    plain = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(standardised(IMAGES)), b.eval().classify(IMAGES), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["coat_tiny", "crossvit_tiny_240"])
def test_a_model_without_a_map_of_patches_is_refused(name):
    with pytest.raises(UserError, match=f"{name} cannot be used.*another model, such as vit_small"):
        build(f"backbone.name={name}", *SHAPELESS, "data.img_size=64")


def test_the_tokens_of_a_model_that_timm_built_by_itself():
    """Whose patch embedding gives a sequence, not a map."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=16, num_heads=2, depth=2)
    b = backbones.wrap(model, [0.5, 0.45, 0.4], [0.25, 0.2, 0.3], {}).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(b(images), model.forward_features(standardised(images)), rtol=0, atol=1e-6)


def test_features_of_several_blocks_come_in_the_order_asked_for():
    b = build("backbone.depth=3")
    with torch.no_grad():
        found = b.features(IMAGES, blocks=(-1, 0, 1))
        alone = [b.features(IMAGES, blocks=(i,))[0] for i in (-1, 0, 1)]
    for (prefix, patches), (p, q) in zip(found, alone, strict=True):
        assert torch.equal(prefix, p) and torch.equal(patches, q)
    assert not torch.equal(found[0][1], found[1][1])


def test_dropping_keeps_each_token_s_own_position():
    b = build()
    tokens = b.patch_embed(IMAGES)
    whole = b.add_positions(tokens, (8, 8))
    keep = torch.tensor([[5, 60, 0], [7, 1, 63]])
    kept = b.add_positions(tokens, (8, 8), keep)
    assert torch.equal(kept[:, :1], whole[:, :1])
    for row in range(2):
        assert torch.equal(kept[row, 1:], whole[row, 1 + keep[row]])


def test_attention_is_the_last_block_s():
    b = build()
    seen = []
    b.model.blocks[-1].attn.fused_attn = False
    b.model.blocks[-1].attn.attn_drop.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        b(IMAGES)
        torch.testing.assert_close(b.attention(IMAGES).flatten(2), seen[0][:, :, 0, 1:], rtol=0, atol=1e-6)


def test_stochastic_depth_is_addressed_and_has_its_rate():
    b = build("backbone.drop_path_rate=0.5", "backbone.depth=3").train()
    rows = torch.arange(6)
    images = torch.rand(6, 3, 16, 16)
    state = torch.get_rng_state()
    with torch.no_grad():
        whole = b(images, draw=Draw(0, 1, rows))
        parts = [b(images[i], draw=Draw(0, 1, rows[i])) for i in (slice(0, 2), slice(2, 6))]
        other = b(images, draw=Draw(0, 2, rows))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(other, whole)
    last = b.model.blocks[-1].drop_path1
    b._draw_depth(Draw(0, 0, torch.arange(4000)), 4000)
    assert (last.scale == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert last.scale.mean().item() == pytest.approx(1.0, abs=0.06)


def test_init_from_takes_weights_and_normalisation_and_resamples_positions(tmp_path):
    old = build()
    torch.nn.init.normal_(old.model.pos_embed)
    weights.save(old, tmp_path / "old")
    same = weights.initialise(build("data.mean=[0, 0, 0]"), str(tmp_path / "old")).eval()
    assert torch.equal(same.features(IMAGES)[0][1], old.features(IMAGES)[0][1])
    larger = weights.initialise(build("data.img_size=32", "backbone.patch_size=2"), str(tmp_path / "old"))
    expected = timm.layers.resample_abs_pos_embed(old.model.pos_embed, (16, 16), (8, 8), num_prefix_tokens=1)
    torch.testing.assert_close(larger.model.pos_embed.data, expected.data)


@RELPOS
def test_init_from_resamples_relative_positions_and_keeps_the_norm_before_a_classifier(tmp_path):
    old = build("backbone.name=test_vit_relpos", *SHAPELESS, "data.img_size=64")
    for name, table in old.model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(table)
    weights.save(old, tmp_path / "old")
    new = weights.initialise(
        build("backbone.name=test_vit_relpos", *SHAPELESS, "data.img_size=96"), str(tmp_path / "old")
    )
    state = old.model.state_dict()
    expected = timm.models.vision_transformer_relpos.checkpoint_filter_fn(state, new.model)
    assert all(torch.equal(value, expected[key]) for key, value in new.model.state_dict().items())
    convnext = build("backbone.name=test_convnext", *SHAPELESS, "data.img_size=64")
    torch.nn.init.normal_(convnext.model.head.norm.weight)
    convnext.add_classifier(3)
    weights.save(convnext, tmp_path / "convnext")
    new = weights.initialise(
        build("backbone.name=test_convnext", *SHAPELESS, "data.img_size=64"), str(tmp_path / "convnext")
    )
    assert torch.equal(new.model.head.norm.weight, convnext.model.head.norm.weight)


@pytest.mark.parametrize(
    ("theirs", "wrong", "remedy"),
    [
        # the qkv weights of 2 and of 4 heads have the same shape
        ([], ["backbone.num_heads=4"], "embed_dim=16 backbone.depth=2 backbone.num_heads=2 backbone.patch_size=2."),
        (
            [],
            ["backbone.embed_dim=32", "backbone.depth=3"],
            "embed_dim=16 backbone.depth=2 backbone.num_heads=2 backbone.patch_size=2.",
        ),
        (["backbone.reg_tokens=3"], [], "backbone.patch_size=2 backbone.reg_tokens=3."),
        ([], ["backbone.reg_tokens=3"], "backbone.patch_size=2 backbone.reg_tokens=0."),
        (["backbone.init_values=0.1"], [], "backbone.patch_size=2 backbone.init_values=1e-5."),
        (["data.in_chans=1", "data.mean=[0]", "data.std=[1]"], [], "backbone.patch_size=2 data.in_chans=1."),
    ],
)
def test_weights_of_another_shape_are_refused_with_the_settings_that_fit(theirs, wrong, remedy, tmp_path):
    weights.save(build(*theirs), tmp_path / "old")
    with pytest.raises(UserError) as error:
        weights.initialise(build(*wrong), str(tmp_path / "old"))
    said = str(error.value)
    assert (
        said.endswith(f"set backbone.{remedy}" if "embed_dim" in remedy else remedy) and "backbone.num_heads=2" in said
    )
    fitting = said.rpartition(": set ")[2].rstrip(".").split()
    weights.initialise(build(*wrong, *fitting, *theirs), str(tmp_path / "old"))


def test_weights_of_another_model_are_refused_with_its_name(tmp_path):
    weights.save(build("backbone.name=resnet10t", *SHAPELESS), tmp_path / "cnn")
    for wrong in (["backbone.name=resnet18", *SHAPELESS], []):
        with pytest.raises(UserError, match="is in the weights alone.*: set backbone.name=resnet10t"):
            weights.initialise(build(*wrong), str(tmp_path / "cnn"))
    args = dict(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=2, num_classes=0)
    pooled = timm.create_model("vit_medium_patch16_gap_240", pretrained=False, **args)  # without class token
    weights.save(backbones.wrap(pooled, [0.5] * 3, [0.5] * 3, args), tmp_path / "pooled")
    with pytest.raises(UserError, match="pos_embed has another shape.*: set backbone.name=vit_medium_patch16_gap"):
        weights.initialise(build("backbone.init_values=1e-5"), str(tmp_path / "pooled"))


def test_a_name_on_the_command_line_gives_that_model():
    facts = ["data.img_size=32", "data.in_chans=3", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"]
    for name, patch in (("vit_small", 4), ("vit_small_patch16_224", 16)):
        recipe = objectives.read_recipe("mae", [f"backbone.name={name}", *facts], None)
        b = backbones.build(recipe.backbone, recipe.data, seed=0)
        assert (b.embed_dim, b.depth, b.patch_size[0], b.model.blocks[0].attn.num_heads) == (384, 12, patch, 6)


def test_windows_are_attended_to_as_so_many_images():
    """What a GPU computes in place of attention of five dimensions, for which it has no fused kernel."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 5, 8, generator=generator)  # (B, heads, windows, tokens, d)
    k, v = torch.randn(2, 2, 3, 4, 6, 8, generator=generator)  # a prefix token more
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(local_vit.folded_attention(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_what_a_convolution_does_not_have_is_refused_and_deit_is_a_vit():
    with pytest.raises(UserError, match="set backbone.depth=null backbone.num_heads=null"):
        build("backbone.name=resnet18")
    recipe = objectives.read_recipe(
        "finetune", ["backbone.name=resnet18", "data.img_size=16"], None
    )  # whose drop_path is 0.1
    with pytest.raises(UserError, match="set backbone.drop_path_rate=0.0, or name a vit"):
        backbones.build(recipe.backbone, recipe.data, seed=0)
    deit = build("backbone.name=deit_tiny_patch16_224", "backbone.patch_size=2")
    assert isinstance(deit, backbones.TokenBackbone) and deit.embed_dim == 16 and deit.input_size == (16, 16)
    assert deit(IMAGES).shape == (2, 65, 16)


@pytest.mark.parametrize("source", ["nowhere", "vit_tiny_patch16_22"])
def test_no_such_backbone(source):
    with pytest.raises(UserError, match=source):
        weights.load(source)


def test_a_damaged_backbone_is_one_sentence(tmp_path):
    weights.save(build(), tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        weights.load(str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("size", "patch"), [((8, 8), 2), ((28, 28), 4), ((32, 32), 4), ((64, 64), 8), ((32, 48), 4), ((16, 16), 2)]
)
def test_auto_patch(size, patch):
    assert backbones.resolve_patch("auto", size) == patch


def test_auto_patch_is_refused_for_photos_and_indivisible_sizes():
    with pytest.raises(UserError, match="mae-photos"):
        backbones.resolve_patch("auto", (224, 224))
    with pytest.raises(UserError, match="do not divide"):
        backbones.resolve_patch(16, (100, 100))
    with pytest.raises(UserError, match="data.img_size"):
        backbones.resolve_patch("auto", (31, 37))


def test_the_seed_alone_makes_the_weights():
    torch.manual_seed(1)
    a = build()
    torch.manual_seed(2)
    b = build()
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_header_names_the_shape_that_is_trained():
    """Not "vit_tiny" where width and depth of the recipe replace it."""
    recipe = small_recipe(
        "mae", "backbone.embed_dim=16", "backbone.depth=3", "backbone.num_heads=2", "backbone.patch_size=4"
    )
    model = backbones.build(recipe.backbone, recipe.data, seed=0)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    said = overview.shape_of(model, recipe.backbone)
    assert said == f"ViT, 16 wide, 3 deep, patch 4, {count:.2f} M parameters"


def test_residuals_are_rescaled_as_beit_s():
    """Only the last weights of each half of block l, by sqrt(2 l), and the rest is of the same seed."""
    plain, scaled = (small_objective("mae", f"backbone.rescale_residual={on}").backbone.model for on in (False, True))
    for (name, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        last = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
        factor = (2 * (1 + int(name.split(".")[1]))) ** -0.5 if last else 1.0
        torch.testing.assert_close(after, factor * before)


def test_a_model_that_norms_its_pooled_vector_is_saved_whole(tmp_path):
    """timm's test_vit4, as its vit_*_gap: the folder opens, here and in timm, to the same logits."""
    recipe = objectives.read_recipe(
        "supervised",
        [
            "backbone.name=test_vit4",
            "backbone.patch_size=16",
            *(f"backbone.{key}=null" for key in ("embed_dim", "depth", "num_heads")),
        ],
        None,
    )
    recipe.add_dataset_info(dict(in_chans=3, mean=[0.5] * 3, std=[0.5] * 3, img_size=160))
    b = backbones.build(recipe.backbone, recipe.data, 0)
    b.add_classifier(4, "avg")
    torch.nn.init.normal_(b.model.head.weight)
    weights.save(b.eval(), tmp_path / "backbone")
    images = torch.rand(2, 3, *b.input_size, generator=torch.Generator().manual_seed(0))
    expected = b.classify(images)
    torch.testing.assert_close(weights.load(str(tmp_path / "backbone")).eval().classify(images), expected)
    timms = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    torch.testing.assert_close(timms(b.normalise(images)), expected)


def test_weights_of_another_attention_are_told(tmp_path, capsys):
    """As ViTDet's, they fit; the same weights compute another function."""
    axial = build("backbone.attn=axial", "backbone.depth=2")
    weights.save(axial, tmp_path / "axial")
    weights.initialise(build("backbone.depth=2"), str(tmp_path / "axial"))
    assert "its attention was axial, and is full here." in capsys.readouterr().out
    weights.initialise(build("backbone.attn=axial", "backbone.depth=2"), str(tmp_path / "axial"))
    assert "attention" not in capsys.readouterr().out


@pytest.mark.parametrize("module", ["mine", "ssl_vit.models.gated"])
def test_a_model_whose_own_forward_pass_would_not_be_trained_is_refused(module, monkeypatch):
    """A ViT of someone else's is run part by part, unless its forward_features does something else."""

    class Gated(VisionTransformer):
        def forward_features(self, x, *args, **options):
            tokens = super().forward_features(x, *args, **options)
            return tokens * self.gate

        gate = 2.0

    Gated.__module__ = module

    def wrapped(model):
        model.pretrained_cfg = dict(architecture="my_gated", input_size=(3, 16, 16))
        return backbones.wrap(model, [0.5] * 3, [0.25] * 3, {})

    def model():
        return Gated(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0)

    with pytest.raises(UserError, match=r"my_gated \(Gated\) is trained as TokenBackbone.*other tokens than its own"):
        wrapped(model())
    monkeypatch.setattr(Gated, "gate", 1.0)
    assert isinstance(wrapped(model()), backbones.TokenBackbone)


@pytest.mark.parametrize("block", [99, 2, -3])
def test_blocks_that_a_model_does_not_have_are_refused(block):
    backbone = small_objective("mae").backbone.eval()
    with pytest.raises(ValueError, match=f"blocks must be from -2 to 1, not {block}"):
        backbone.features(torch.rand(1, 3, 16, 16), [block])
    first, last = (backbone.features(torch.rand(1, 3, 16, 16), [b])[0][1].shape for b in (-2, 1))
    assert first == last == (1, 8, 8, 16)


def test_a_model_that_does_not_say_what_is_needed_is_refused_with_the_remedy():
    class Net(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.num_features, self.pretrained_cfg = 4, dict(architecture="own_net", input_size=(3, 16, 16))
            self.stem = torch.nn.Conv2d(3, 4, 4, 4)

        def forward_features(self, x):
            return self.stem(x)

    with pytest.raises(UserError, match=r"own_net \(Net\) has no feature_info, which states num_chs, the width"):
        backbones.wrap(Net(), [0.5] * 3, [0.5] * 3, {})
    model = Net()
    model.feature_info = [dict(num_chs=4, reduction=4, module="stem")]
    assert backbones.wrap(model, [0.5] * 3, [0.5] * 3, {}).stride == (4, 4)
    with pytest.raises(UserError, match="timm does not know the input size of own_net: add an entry to default_cfgs"):
        timm_models.published_size("own_net")


def test_a_model_that_timm_has_no_card_of_fails_for_its_own_reason(monkeypatch):
    """And not because timm does not know the size of its images."""
    model = timm.create_model("resnet10t", num_classes=0)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)

    def fail(images, **options):
        raise RuntimeError("the true reason")

    monkeypatch.setattr(model, "forward_features", fail)
    monkeypatch.setattr(model, "forward_intermediates", fail)
    with pytest.raises(UserError, match=r"cannot be used \(the true reason\): use another model"):
        backbones.wrap(model, [0.5] * 3, [0.5] * 3, {})
