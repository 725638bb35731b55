"""The kinds of backbones: what each can do, that it is the library's own, and what it must not see."""

import math
import signal
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL, make_batch, small_objective, small_recipe
from generate import backbones as table
from test_backbone import SHAPELESS, standardised
from test_loop import ROOT, Started, log_of, run

from ssl_vit import backbones, corruption, objectives, pretrain, weights
from ssl_vit.backbones import Replacement
from ssl_vit.decoders import LinearHead
from ssl_vit.errors import UserError
from ssl_vit.patches import unpatchify
from ssl_vit.randomness import Draw

# name → settings, on images of 16 px where nothing else is said
KINDS = {
    "vit": [],
    "eva": ["backbone.name=eva02_tiny_patch14_224", "backbone.patch_size=2"],
    "dinov3": ["backbone.name=vit_small_patch16_dinov3", "backbone.patch_size=2"],
    "rope": ["backbone.name=vit_small_patch16_rope_mixed_224", "backbone.patch_size=2"],
    "hybrid": ["backbone.name=hybrid"],
    "timm's hybrid": ["backbone.name=vit_tiny_r_s16_p8_224", "data.img_size=64"],
    "axial": ["backbone.attn=axial"],
    "window": ["backbone.attn=window", "backbone.global_every=2"],
    "swin": ["backbone.name=swin", "backbone.embed_dim=16", *SHAPELESS[1:]],
    "swinv2": ["backbone.name=swinv2_tiny_window8_256", *SHAPELESS, "data.img_size=64"],
    "cvt": ["backbone.name=cvt", *SHAPELESS],
    "resnet": ["backbone.name=resnet18", *SHAPELESS],
    "convnext": ["backbone.name=convnext_atto", *SHAPELESS, "data.img_size=64"],
    "bit": ["backbone.name=resnetv2_50x1_bit", *SHAPELESS, "data.img_size=64"],
}
TOKENS = ["vit", "axial", "window", "eva", "dinov3", "rope", "hybrid", "timm's hybrid"]  # kinds with stochastic depth
REPLACING = [*TOKENS, "swin", "swinv2", "cvt"]
DROPPING = ["vit", "eva", "dinov3", "rope"]


def build(kind, *settings):
    """A backbone of this kind, every parameter of which matters."""
    recipe = small_recipe("simmim", "backbone.pos_embed=learned", *KINDS[kind], *settings)
    backbone = backbones.build(recipe.backbone, recipe.data, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return backbone


def pictures(backbone, count=3):
    return torch.rand(count, 3, *backbone.input_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("kind", ["vit", "eva", "dinov3", "rope"])
def test_the_head_reads_what_the_recipe_says(kind, pool, tmp_path):
    """The class token or the mean of the patches, also after saving, whatever the model's name stands for."""
    b = build(kind).eval()
    b.add_classifier(4, pool)
    torch.nn.init.normal_(b.model.head.weight, generator=torch.Generator().manual_seed(2))
    images = pictures(b)
    weights.save(b, tmp_path / "b")
    with torch.no_grad():
        tokens = b(images)
        pooled = tokens[:, 0] if pool == "token" else tokens[:, b.num_prefix_tokens :].mean(1)
        expected = b.model.head(b.model.fc_norm(pooled))
        torch.testing.assert_close(b.classify(images), expected)
        torch.testing.assert_close(weights.load(str(tmp_path / "b")).eval().classify(images), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_features_are_timm_s_own(kind, tmp_path):
    b = build(kind).eval()
    images = pictures(b)
    with torch.no_grad():
        expected = b.model.forward_features(standardised(images))
        if expected.ndim == 4:
            expected = expected if getattr(b.model, "output_fmt", "") == "NHWC" else expected.permute(0, 2, 3, 1)
            expected = expected.flatten(1, 2)
        tokens = b(images)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        [(prefix, patches)] = b.features(images)
        assert torch.allclose(torch.cat([prefix, patches.flatten(1, 2)], 1), tokens, rtol=0, atol=1e-5)
        assert patches.shape[1:3] == b.grid(images) and prefix.shape[1] == b.num_prefix_tokens
        assert tuple(s * g for s, g in zip(b.stride, b.grid(images), strict=True)) == b.input_size
        pooled = tokens[:, 0] if b.has_class_token else tokens[:, b.num_prefix_tokens :].mean(1)
        assert torch.equal(b.pool(tokens), pooled)
        weights.save(b, tmp_path / "b")
        plain = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
        assert torch.equal(plain.forward_features(standardised(images)), b.model.forward_features(standardised(images)))
    again = weights.load(str(tmp_path / "b")).eval()
    assert type(again) is type(b) and torch.equal(again(images), b(images))


def replacement(b, hidden, token=1.0):
    direction = torch.randn(1, 1, b.token_dim, generator=torch.Generator().manual_seed(5))
    return Replacement(hidden, token * direction, lambda tokens: tokens)


@pytest.mark.parametrize("kind", REPLACING)
@pytest.mark.parametrize("training", [False, True])
def test_hidden_pixels_are_not_seen(kind, training):
    b = build(kind).train(training)
    images = pictures(b)
    rows, columns = b.grid(images)
    hidden = torch.zeros(3, rows * columns, dtype=torch.bool)
    hidden[:, 1] = hidden[0, -1] = True
    spread = hidden.view(3, 1, rows, columns)
    spread = spread.repeat_interleave(b.stride[0], 2).repeat_interleave(b.stride[1], 3)
    others = torch.where(spread, torch.rand_like(images), images)
    with torch.no_grad():
        seen, again = (b(x, replace=replacement(b, hidden)) for x in (images, others))
        assert torch.equal(seen, again)
        assert not torch.allclose(seen, b(images, replace=replacement(b, hidden, token=-1.0)), atol=1e-3)
        elsewhere = torch.where(spread, images, torch.rand_like(images))
        assert not torch.allclose(seen, b(elsewhere, replace=replacement(b, hidden)), atol=1e-3)
        nothing = b(images, replace=replacement(b, torch.zeros_like(hidden)))
        torch.testing.assert_close(nothing, b(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", REPLACING)
def test_a_patch_that_shows_another_one_is_seen_in_its_place(kind):
    """As masked patch prediction does: the same as if the pixels had been moved."""
    b = build(kind).eval()
    images = pictures(b)
    rows, columns = b.grid(images)
    order = torch.arange(rows * columns).roll(1)
    move = Replacement(
        torch.zeros(3, rows * columns, dtype=torch.bool), torch.zeros(1, 1, b.token_dim), lambda t: t[:, order]
    )
    patches = backbones.base.patchify(images, b.stride)[:, order]
    with torch.no_grad():
        expected = b(unpatchify(patches, b.stride, (rows, columns)))
        torch.testing.assert_close(b(images, replace=move), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", DROPPING)
def test_dropped_patches_leave_the_others_their_places(kind):
    """All patches in another order are the same tokens in that order; what is dropped is not seen."""
    b = build(kind).eval()
    images, p = pictures(b), b.num_prefix_tokens
    with torch.no_grad():
        whole = b(images)
        order = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(3)])
        found = b(images, keep=order)
        torch.testing.assert_close(found[:, :p], whole[:, :p], rtol=0, atol=1e-5)
        for row in range(3):
            torch.testing.assert_close(found[row, p:], whole[row, p + order[row]], rtol=0, atol=1e-5)
        few = order[:, :9]
        hidden = torch.ones(3, 64, dtype=torch.bool).scatter(1, few, False)
        others = torch.where(
            hidden.view(3, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3), torch.rand_like(images), images
        )
        assert torch.equal(b(images, keep=few), b(others, keep=few)) and b(images, keep=few).shape[1] == p + 9


@pytest.mark.parametrize("kind", DROPPING)
def test_a_patch_that_may_not_look_does_not(kind):
    """A causal mask: the first patch is the same whatever comes behind it."""
    b = build(kind).eval()
    images, p = pictures(b), b.num_prefix_tokens
    attend = torch.ones(p + 64, p + 64, dtype=torch.bool).tril()
    attend[p:, :p] = False
    others = images.clone()
    others[:, :, 2:] = torch.rand_like(others[:, :, 2:])
    with torch.no_grad():
        one, two = (b(x, attend=attend[None, None])[:, p : p + 8] for x in (images, others))
    assert torch.equal(one, two) and not torch.equal(b(images)[:, p : p + 8], b(others)[:, p : p + 8])


@pytest.mark.parametrize("kind", TOKENS)
def test_stochastic_depth_is_addressed(kind):
    b = build(kind, "backbone.drop_path_rate=0.5").train()
    rows, images, state = torch.arange(6), pictures(b, 6), torch.get_rng_state()
    with torch.no_grad():
        whole = b(images, draw=Draw(0, 1, rows))
        parts = [b(images[i], draw=Draw(0, 1, rows[i])) for i in (slice(0, 2), slice(2, 6))]
        other = b(images, draw=Draw(0, 2, rows))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
    assert not torch.allclose(other, whole, atol=1e-3)


OBJECTIVES = {"supervised": ["backbone.drop_path_rate=0"], "dino": [], "gaussian": [], "simmim": [], "mae": []}


@pytest.mark.parametrize("kind", ["dinov3", "hybrid", "axial", "swin", "cvt", "resnet"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train_what_can_do_it_and_refuse_the_rest(kind, name):
    can = dict(simmim=kind in REPLACING, mae=kind in DROPPING).get(name, True)
    settings = [*KINDS[kind], *OBJECTIVES[name]]
    if not can:
        with pytest.raises(UserError, match=r"^Reconstruct must (put mask tokens|leave patches out)\b.*use a recipe"):
            small_objective(name, *settings)
        return
    objective = small_objective(name, *settings)
    state = torch.get_rng_state()
    loss = objective(make_batch(objective, torch.arange(6)))["loss"]
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state) and loss.isfinite()
    for key, weight in objective.backbone.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.isfinite().all(), key
    cells = objective.backbone.grid(torch.empty(1, 3, 16, 16))
    if name in ("gaussian", "simmim", "mae"):
        prediction, mask, *_ = objective.predict(torch.rand(2, 3, 16, 16), Draw(0, 0, torch.arange(2)))
        assert prediction.shape == (2, mask.shape[1], 3 * 16 * 16 // (cells[0] * cells[1]))
        sheet = objective.eval().show(torch.rand(2, 3, 16, 16), Draw(0, 0, torch.arange(2)))["reconstruction"]
        assert sheet.panels.shape[-2:] == (16, 16)
    if name == "dino":  # attention of a class token is shown where there is one
        assert objective.shows == (kind == "hybrid")


@pytest.mark.parametrize("kind", ["axial", "window"])
def test_local_attention_is_that_of_a_plain_vit_under_a_mask(kind):
    """A block at a time: patches see their row, their column or their window, and all see prefix tokens."""
    b = build(kind, "backbone.reg_tokens=1").eval()
    plain = build("vit", "backbone.reg_tokens=1").eval()
    plain.model.load_state_dict(b.model.state_dict())
    images = pictures(b)
    row, column = torch.arange(64) // 8, torch.arange(64) % 8
    same = {"row": row[:, None] == row, "column": column[:, None] == column}
    same["window"] = (row[:, None] // 4 == row // 4) & (column[:, None] // 4 == column // 4)
    same["all"] = torch.ones(64, 64, dtype=torch.bool)
    kinds = dict(axial=["row", "column"], window=["window", "all"])[kind]
    with torch.no_grad():
        x = plain.add_positions(plain.patch_embed(images), (8, 8))
        for block, name in zip(plain.model.blocks, kinds, strict=True):
            mask = torch.ones(66, 66, dtype=torch.bool)
            mask[2:, 2:] = same[name]
            x = block(x, attn_mask=mask[None, None])
        torch.testing.assert_close(b(images), plain.model.norm(x), rtol=0, atol=1e-5)
        assert not torch.allclose(b(images), plain(images), atol=1e-3)


def test_swin_is_masked_as_in_simmim():
    """Mask tokens after the patch embedding, 4x4 of them to a masked unit of 32 px, and a 1x1 convolution with pixel
    shuffle behind the encoder (official models/simmim.py)."""
    b = build("swinv2").eval()
    images = pictures(b)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [1, 1, 1, 0]]).bool()
    with torch.no_grad():
        found = b(images, replace=replacement(b, mask, 0.3))
        x = b.model.patch_embed(standardised(images))
        w = mask.view(3, 2, 2, 1).repeat_interleave(8, 1).repeat_interleave(8, 2).float()
        x = x * (1 - w) + 0.3 * torch.randn(b.token_dim, generator=torch.Generator().manual_seed(5)) * w
        z = b.model.norm(b.model.layers(x))
        torch.testing.assert_close(found, z.flatten(1, 2), rtol=0, atol=1e-5)
        head = LinearHead(b.embed_dim, 0, 3 * 32 * 32)
        picture = unpatchify(head(found), b.stride, (2, 2))
        # ours counts rows, columns, channels; pixel shuffle channels, rows, columns
        weight = head.head.weight.view(32, 32, 3, -1).permute(2, 0, 1, 3).reshape(3 * 32 * 32, -1, 1, 1)
        theirs = F.pixel_shuffle(F.conv2d(z.permute(0, 3, 1, 2), weight), 32)
        torch.testing.assert_close(picture, theirs, rtol=0, atol=1e-5)


def test_dino_s_teacher_normalises_by_its_own_batches():
    """As in the official code, where it is never in eval mode: so that what is exported has statistics of its own."""
    objective = small_objective("dino", *KINDS["resnet"])
    teacher, student = objective.teacher.model.bn1, objective.backbone.model.bn1
    objective(make_batch(objective, torch.arange(6)))
    assert teacher.num_batches_tracked == 1 and student.num_batches_tracked == 2  # it sees the global crops alone
    two = make_batch(objective, torch.arange(6)).views
    x = objective.teacher.model.conv1(standardised(torch.cat([two["global1"], two["global2"]])))
    torch.testing.assert_close(teacher.running_mean, 0.1 * x.mean((0, 2, 3)))
    objective.eval()
    objective(make_batch(objective, torch.arange(6)))
    assert teacher.num_batches_tracked == 1


def test_a_small_build_fits_the_images():
    """(side in pixels, patch, sides of the grids, window) of the swins; strides of the others."""
    for side, patch, grids, window in (
        (8, 1, [8, 4], 4),
        (28, 2, [14, 7], 7),
        (32, 2, [16, 8, 4], 4),
        (64, 4, [16, 8, 4], 4),
        (224, 4, [56, 28, 14, 7], 7),
    ):
        recipe = small_recipe("simmim", "backbone.name=swin", *SHAPELESS, f"data.img_size={side}")
        with torch.device("meta"):
            b = backbones.build(recipe.backbone, recipe.data, 0)
        stages = list(b.model.layers)
        assert b.patch_size == (patch, patch) and [s.blocks[0].input_resolution[0] for s in stages] == grids
        assert (
            stages[0].blocks[0].window_size == (window, window)
            and b.grid(torch.empty(1, 3, side, side)) == (grids[-1],) * 2
        )
    for name, strides in dict(cvt=(2, 4, 8), resnet18=(2, 4, 8), hybrid=(2, 2, 4)).items():
        for side, stride in zip((8, 16, 32), strides, strict=True):
            recipe = small_recipe("simmim", f"backbone.name={name}", *SHAPELESS, f"data.img_size={side}")
            assert backbones.build(recipe.backbone, recipe.data, 0).stride == (stride, stride), (name, side)


REFUSED = {
    "windows that do not divide": (
        ["backbone.name=swin_tiny_patch4_window7_224", "data.img_size=64"],
        "cannot take images of 64x64 .windows of 7x7 do not divide a grid of 16x16 patches.: set data.img_size=224, or",
    ),
    "too small for the stages": (
        ["backbone.name=swinv2_tiny_window8_256", "data.img_size=16"],
        "stage 4 of 4 would halve a grid of 1x1 patches",
    ),
    "too small for a swin": (
        ["backbone.name=swin", "data.img_size=3"],
        "backbone.name=swin needs whole patches, 4 or more",
    ),
    "patches that do not divide": (
        ["backbone.name=cvt", "backbone.patch_size=3"],
        "backbone.name=cvt needs whole patches",
    ),
    "a width of no heads": (["backbone.name=swin", "backbone.embed_dim=50"], "does not divide into 3 attention heads"),
    "an odd width": (["backbone.name=resnet18", "backbone.embed_dim=15"], "channels are even: set 16"),
    "a depth": (["backbone.name=swin", "backbone.depth=3"], "no plain ViT and has no depth: set backbone.depth=null"),
    "a window that does not divide": (
        ["backbone.attn=window", "backbone.window_size=3"],
        "window_size=3 does not divide",
    ),
    "windows of what has its own": (["backbone.name=swin", "backbone.attn=axial"], "backbone.attn=axial is for vit_"),
    "no such name": (["backbone.name=swinn"], "give one of vit_tiny, .*, swin, hybrid, cvt, resnet18"),
    "a grid that does not divide": (
        ["backbone.name=resnet18", "data.img_size=70"],
        "Reconstruct must read a grid of patches, which resnet18 does not allow .images of 70x70",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case):
    settings, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as error:
        small_objective("gaussian", *SHAPELESS, *settings)
    assert len(error.value.sentences) == 1


def test_published_resnets_stay_timm_s():
    """Where weights are to start from, and for photos; the small build is recorded under its own name."""
    for settings, name in (
        ([], "ssl_vit_resnet18"),
        (["data.img_size=96"], "resnet18"),
        (["backbone.init_from=x"], "resnet18"),
    ):
        recipe = small_recipe("gaussian", *KINDS["resnet"], *settings)
        assert backbones.build(recipe.backbone, recipe.data, 0).name == name


def test_a_small_resnet_has_the_width_of_its_first_stage(tmp_path):
    def build(*settings):
        recipe = small_recipe("gaussian", *KINDS["resnet"], *settings)
        return backbones.build(recipe.backbone, recipe.data, 0)

    narrow, usual = build("backbone.embed_dim=16"), build()
    # torchvision's resnet18 without its classifier, with a 3x3 stem in place of the 7x7 one
    assert sum(p.numel() for p in usual.parameters()) == 11_689_512 - 513_000 - 64 * 3 * (7 * 7 - 3 * 3)
    assert narrow.embed_dim == 128 and narrow.stride == usual.stride
    stages = [getattr(narrow.model, f"layer{stage}")[-1].conv2.weight for stage in (1, 2, 3, 4)]
    assert [tuple(weight.shape) for weight in stages] == [(w, w, 3, 3) for w in (16, 32, 64, 128)]
    weights.save(narrow, tmp_path / "narrow")
    again, images = weights.load(str(tmp_path / "narrow")), pictures(narrow)
    assert torch.equal(again.eval()(images), narrow.eval()(images))
    with pytest.raises(UserError, match="backbone.embed_dim=64.*: set backbone.embed_dim=16"):
        weights.initialise(usual, str(tmp_path / "narrow"))


def test_cvt_is_the_library_s_own():
    """transformers' CvtModel with the same weights, in both modes; its norm of all tokens is in its classifier."""
    transformers = pytest.importorskip("transformers")
    dims, depths, heads = [48, 96, 192], [1, 2, 3], [1, 2, 4]
    config = transformers.CvtConfig(
        patch_sizes=[7, 3, 3], embed_dim=dims, depth=depths, num_heads=heads, drop_path_rate=[0.0] * 3
    )
    theirs = transformers.CvtModel(config)
    ours = timm.create_model("ssl_vit_cvt", num_classes=0, depths=depths, kernels=(7, 3, 3), strides=(4, 2, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1))
    names = {
        "embedding.convolution_embeddings.projection": "embed.proj",
        "embedding.convolution_embeddings.normalization": "embed.norm",
        "layers": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "attention.output.dense": "attn.proj",
        "output.dense": "mlp.fc2",
    }
    for part, letter in dict(query="q", key="k", value="v").items():
        names[f"attention.attention.convolution_projection_{part}.convolution_projection.convolution"] = (
            f"attn.conv_{letter}.0"
        )
        names[f"attention.attention.convolution_projection_{part}.convolution_projection.normalization"] = (
            f"attn.conv_{letter}.1"
        )
        names[f"attention.attention.projection_{part}"] = f"attn.{letter}"
    state = {}
    for key, value in theirs.state_dict().items():
        key = key.removeprefix("encoder.")
        for old, new in names.items():
            key = key.replace(old, new)
        state[key] = value
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and sorted(missing) == ["norm.bias", "norm.weight"]
    ours, theirs = ours.double(), theirs.double()  # float32 rounds to 1e-5 of either
    images = torch.rand(3, 3, 64, 64, generator=generator).double()
    for mode in (False, True):
        a, b = ours.train(mode), theirs.train(mode)
        expected = b(images, output_hidden_states=True)
        tokens = torch.cat([expected.cls_token_value, expected.last_hidden_state.flatten(2).transpose(1, 2)], 1)
        found = a.forward_features(images)
        torch.testing.assert_close(found, F.layer_norm(tokens, (192,)), rtol=0, atol=1e-9)
    with torch.no_grad():
        ours.eval(), theirs.eval()
        maps = ours.forward_intermediates(images, [0, 2])
        for own, place in zip(maps, (0, 2), strict=True):
            torch.testing.assert_close(
                own, theirs(images, output_hidden_states=True).hidden_states[place], rtol=1e-5, atol=1e-9
            )


@pytest.mark.parametrize("first", ["timm", "ssl_vit"])
def test_a_saved_folder_opens_after_our_import_alone(first, tmp_path):
    """In a process of its own; without ours, timm knows no such architecture and gives no other."""
    weights.save(build("cvt"), tmp_path / "b")
    code = "import timm; timm.create_model('local-dir:b', pretrained=True)"
    texts = {
        "timm": f"import timm, ssl_vit; {code}",
        "ssl_vit": f"import ssl_vit, sys; assert 'timm' not in sys.modules; {code}",
    }
    for text, fails in ((texts[first], False), *([(code, True)] if first == "timm" else [])):
        done = subprocess.run(
            [sys.executable, "-c", text],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            capture_output=True,
            text=True,
        )
        assert bool(done.returncode) == fails and (not fails or "ssl_vit_cvt" in done.stderr), done.stderr


def test_a_run_records_the_build(tmp_path):
    """Its patch size and name, so that fine-tuning at another size builds the same."""
    recipe = objectives.read_recipe(
        "gaussian", [*SHAPELESS, "backbone.name=swin", "data.img_size=32", "objective.decoder_depth=1"], None
    )
    images = pretrain.data.load(recipe.data, "train")
    recipe.add_dataset_info(images.info())
    pretrain.build(recipe, images)
    assert (recipe.backbone.name, recipe.backbone.patch_size) == ("ssl_vit_swin", 2)
    again = backbones.build(recipe.backbone, recipe.data, 0)
    assert isinstance(again, backbones.SwinBackbone) and again.patch_size == (2, 2)


# -- docs/backbones.md ------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs" / "backbones.md").read_text() == table.page()


def test_what_a_kind_cannot_do():
    """Read off the issue that asked for it, not the code."""
    no = dict(
        hybrid={"mae", "next"}, swin={"mae", "next"}, cvt={"mae", "next"}, resnet={"simmim", "beit", "mae", "next"},
        bit={"simmim", "beit", "mae", "next"}, convnext={"simmim", "beit", "mae", "next"}, swinv2={"mae", "next"},
    )  # fmt: skip
    no["axial"] = no["window"] = {"mae", "next"}
    no["timm-hybrid"] = {"mae", "next"}
    for name, kind in table.KINDS.items():
        backbone = table.build(kind)
        refused = {use for use in table.USES if table.refusal(backbone, table.USES[use])}
        assert refused == no.get(name, set()), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "vit"])
def test_no_token_holds_pixels_of_later_patches(kind):
    """What the next patch is predicted from, else its answer is among the inputs. A plain ViT: in test_corruption."""
    backbone = build(kind).eval()
    if backbone.lacks("attend"):
        return
    images = pictures(backbone)
    _, attend = corruption.next_patch(torch.zeros(1, 1), backbone.grid(images), backbone.num_prefix_tokens)
    height, width = backbone.stride
    other = images.clone()
    other[..., -height:, -width:] = 1 - other[..., -height:, -width:]
    with torch.no_grad():
        before, after = (backbone(pixels, attend=attend)[:, backbone.num_prefix_tokens :] for pixels in (images, other))
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-3)


HEAVY = {"swinv2", "resnet", "bit", "convnext"}  # of which a step takes a second and more


def told(kind, use):
    """The arguments of a small run on the digits, in colour and enlarged."""
    backbone = table.KINDS[kind]
    settings = [f"backbone.{key}={value}" for key, value in backbone.settings.items()]
    small = [s for s in SMALL[table.USES[use].recipe] if not s.startswith("backbone.")]
    few = 2 if use == "supervised" else 12  # images of a class
    data = [f"data.img_size={backbone.size}", "data.in_chans=3", f"data.subset={few}", "views.scale=[0.7,1]"]
    short = ["train.steps=14"] * (use != "supervised") + [
        f"train.batch_size={8 if kind in HEAVY else 24}",
        "optim.warmup_fraction=0.1",
        "runtime.save_every=5",
        "monitor.log_every=1",
    ]
    short += ["monitor.knn_every=0", "monitor.trackers=none", "runtime.num_threads=1", "runtime.num_workers=0"]
    rate = 1e-4 if use == "dino" else 1e-3  # a recipe's is for batches of 256
    short += ["optim.lr_rule=absolute", f"optim.lr={rate}"]
    short += ["train.steps=40"] if use == "supervised" else []
    every = [*settings, *small, *data, *short, *table.USES[use].settings]
    return ["--recipe", table.USES[use].recipe, *every]


@pytest.mark.matrix
@pytest.mark.parametrize("use", table.USES)
@pytest.mark.parametrize("kind", table.KINDS)
def test_every_kind_by_every_objective_on_images(kind, use, tmp_path):
    """What the page says yes to learns, goes on where it stopped (a heavy kind by one objective), opens in timm and
    gives timm's features; the rest is refused with the page's reason."""
    why = table.refusal(table.build(table.KINDS[kind]), table.USES[use])
    arguments = told(kind, use)
    if why is not None:
        started = Started(tmp_path, *arguments, "--output", "run")
        assert started.wait() == 2 and why in " ".join(started.said.split()), started.said
        return
    run(tmp_path, *arguments, "--output", "run")
    losses = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    if use != "dino":  # whose loss follows its teacher, up and down
        assert sum(losses[-4:]) < 0.99 * sum(losses[:4]), losses
    assert all(map(math.isfinite, losses))
    saved = (tmp_path / "run" / "backbone" / "model.safetensors").read_bytes()
    if kind not in HEAVY or use == "gaussian":
        started = Started(tmp_path, *arguments, "--output", "stopped", ends=(5, signal.SIGTERM))
        assert started.wait() == 143, started.said
        run(tmp_path, *arguments, "--output", "stopped")
        assert (tmp_path / "stopped" / "backbone" / "model.safetensors").read_bytes() == saved
    backbone = weights.load(str(tmp_path / "run")).eval()
    plain = timm.create_model(f"local-dir:{tmp_path / 'run' / 'backbone'}", pretrained=True).eval()
    images = pictures(backbone)
    with torch.no_grad():
        [(prefix, patches)] = backbone.features(images)
        found = plain.forward_features((images - backbone.mean) / backbone.std)
    if found.ndim == 4:
        found = (found if getattr(plain, "output_fmt", "") == "NHWC" else found.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(torch.cat([prefix, patches.flatten(1, 2)], 1), found, rtol=1e-5, atol=1e-5)
