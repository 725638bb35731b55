"""Weights of other codes: each layout under its real names gives the outputs of the published model, to 1e-5."""

import argparse
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import reference_models as ref
import timm
import torch
from reference_models import DEPTH, GRID, HEADS, PATCH, WIDTH, linear, norm, random
from safetensors.torch import load_file, save_file
from test_loop import ROOT, environment

from ssl_vit import backbones, objectives, weights
from ssl_vit.backbones import sincos_positions
from ssl_vit.errors import UserError
from ssl_vit.weights import layouts, reading

SIZE = GRID * PATCH
IMAGES = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
GIVEN = f",num_heads={HEADS}"
HALF = ",mean=half,std=half"


def scales(*names):
    return {f"blocks.{i}.{name}": random(WIDTH, std=0.5) for i in range(DEPTH) for name in names}


def sines(width=WIDTH, grid=GRID):
    """MAE's positions (pos_embed.py): x then y, each sines then cosines; zero for the class token."""
    at = torch.zeros(1, 1 + grid * grid, width)
    for n in range(grid * grid):
        for half, coordinate in enumerate((n % grid, n // grid)):
            for i in range(width // 4):
                angle = torch.tensor(coordinate / 10000 ** (i / (width / 4)))
                at[0, 1 + n, half * width // 2 + i] = angle.sin()
                at[0, 1 + n, half * width // 2 + width // 4 + i] = angle.cos()
    return at


def mae():
    return ref.vit() | dict(pos_embed=sines())


def moco(width=WIDTH, grid=GRID):
    """MoCo v3's positions (vits.py): y then x."""
    at = sines(width, grid)
    return torch.cat([at[..., width // 2 :], at[..., : width // 2]], 2)


def moco_full():
    """As main_moco.py saves it: both encoders, with their projectors, and the predictor."""
    base, momentum = (ref.vit() | dict(pos_embed=moco()) for _ in range(2))
    head = {"head.0.weight": random(8, WIDTH), "head.1.running_mean": random(8)}
    saved = {f"module.base_encoder.{k}": v for k, v in (base | head).items()}
    saved |= {f"module.momentum_encoder.{k}": v for k, v in (momentum | head).items()}
    saved["module.predictor.0.weight"] = random(8, 8)
    return dict(epoch=300, arch="vit_small", state_dict=saved, optimizer=dict(state={})), base, momentum


def mae_decoder():
    found = dict(mask_token=random(1, 1, 16), decoder_pos_embed=sines(16)) | linear("decoder_embed", WIDTH, 16)
    return (
        found | linear("decoder_blocks.0.attn.qkv", 16, 48) | norm("decoder_norm", 16) | linear("decoder_pred", 16, 192)
    )


def fine_tuned():
    found = ref.vit() | linear("head", WIDTH, 7)
    return {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v for name, v in found.items()}


def dino_full():
    backbone, head = ref.vit(), linear("head.mlp.0", WIDTH, 8) | dict([("head.last_layer.weight_g", random(9, 1))])
    student = {f"module.backbone.{k}": v for k, v in ref.vit().items()}
    student |= {f"module.{k}": v for k, v in head.items()}
    teacher = {f"backbone.{k}": v for k, v in backbone.items()} | head
    args = argparse.Namespace(arch="vit_small", patch_size=8)
    return dict(
        student=student, teacher=teacher, optimizer=dict(state={}), epoch=3, args=args, dino_loss={"center": random(1)}
    )


def deit3():
    return (
        ref.vit() | dict(pos_embed=random(1, GRID**2, WIDTH)) | scales("gamma_1", "gamma_2") | linear("head", WIDTH, 5)
    )


def dinov2(registers=0, swiglu=False):
    found = ref.vit() | scales("ls1.gamma", "ls2.gamma") | dict(mask_token=random(1, WIDTH))
    if registers:
        found["register_tokens"] = random(1, registers, WIDTH)
    if swiglu:
        found = {name: v for name, v in found.items() if ".mlp." not in name}
        for i in range(DEPTH):
            found |= linear(f"blocks.{i}.mlp.w12", WIDTH, 256) | linear(f"blocks.{i}.mlp.w3", 128, WIDTH)
    return found


def chunked():
    """As DINOv2's training code saves it: {"model": student.…, teacher.…}, blocks in chunks."""
    names = {name: v for name, v in dinov2().items()}
    teacher = {f"teacher.backbone.{k.replace('blocks.', 'blocks.0.')}": v for k, v in names.items()}
    student = {f"student.{k.removeprefix('teacher.')}": v + 1 for k, v in teacher.items()}
    return dict(model=student | teacher | {"teacher.dino_head.mlp.0.weight": random(3, 3)}), names


def dinov3(gated=False):
    found = {k: v for k, v in ref.vit().items() if k != "pos_embed"} | scales("ls1.gamma", "ls2.gamma")
    found |= dict(storage_tokens=random(1, 4, WIDTH), mask_token=random(1, WIDTH))
    found["rope_embed.periods"] = 100 ** (2 * torch.arange(4) / 8)
    for i in range(DEPTH):
        found[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(WIDTH)
        if gated:
            found = {name: v for name, v in found.items() if f"blocks.{i}.mlp." not in name}
            found |= linear(f"blocks.{i}.mlp.w1", WIDTH, 128) | linear(f"blocks.{i}.mlp.w2", WIDTH, 128)
            found |= linear(f"blocks.{i}.mlp.w3", 128, WIDTH)
    return found


def beit(shared=False, tuned=False, absolute=False):
    found = {k: v for k, v in ref.vit(bias=False).items() if k != "pos_embed" or absolute}
    if not absolute:
        found |= scales("gamma_1", "gamma_2")
    rows = (2 * GRID - 1) ** 2 + 3
    for i in range(DEPTH):
        found |= {f"blocks.{i}.attn.{one}_bias": random(WIDTH) for one in "qv"}
        if not shared and not absolute:
            found[f"blocks.{i}.attn.relative_position_bias_table"] = random(rows, HEADS, std=1.0)
            found[f"blocks.{i}.attn.relative_position_index"] = torch.zeros(GRID**2 + 1, GRID**2 + 1, dtype=torch.long)
    if shared:
        found["rel_pos_bias.relative_position_bias_table"] = random(rows, HEADS, std=1.0)
        found["rel_pos_bias.relative_position_index"] = torch.zeros(GRID**2 + 1, GRID**2 + 1, dtype=torch.long)
    if tuned:
        found = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in found.items()}
        return found | linear("head", WIDTH, 7)
    return found | dict(mask_token=random(1, 1, WIDTH)) | linear("lm_head", WIDTH, 9)


def openclip():
    found = {"visual.class_embedding": random(WIDTH), "visual.positional_embedding": random(1 + GRID**2, WIDTH)}
    found |= {"visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH, std=0.1), "visual.proj": random(WIDTH, 20)}
    found |= norm("visual.ln_pre") | norm("visual.ln_post")
    for i in range(DEPTH):
        at = f"visual.transformer.resblocks.{i}"
        found |= norm(f"{at}.ln_1") | norm(f"{at}.ln_2") | linear(f"{at}.attn.out_proj", WIDTH, WIDTH)
        found |= {f"{at}.attn.in_proj_weight": random(3 * WIDTH, WIDTH), f"{at}.attn.in_proj_bias": random(3 * WIDTH)}
        found |= linear(f"{at}.mlp.c_fc", WIDTH, 4 * WIDTH) | linear(f"{at}.mlp.c_proj", 4 * WIDTH, WIDTH)
    text = {"token_embedding.weight": random(9, 8), "transformer.resblocks.0.ln_1.weight": random(8)}
    return (
        found
        | text
        | dict(logit_scale=torch.tensor(4.6), positional_embedding=random(7, 8), text_projection=random(8, 20))
    )


def tokens(backbone):
    """(class token and all others that the features hold, in their order) of IMAGES: (B, P + N, D)."""
    [(prefix, patches)] = backbone.eval().features(IMAGES)
    return torch.cat([prefix, patches.flatten(1, 2)], 1)


def standardised(mean, std):
    return (IMAGES - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < tolerance * expected.abs().max(), (found - expected).abs().max()


def under(*wrappers, tensors, beside=None, prefix=""):
    """(what is saved, the tensors of the backbone in it)."""
    saved = {prefix + name: value for name, value in (tensors | (beside or {})).items()}
    for wrapper in reversed(wrappers):
        saved = {wrapper: saved}
    return saved, tensors


def dino(branch):
    full = dino_full()
    prefix = dict(teacher="backbone.", student="module.backbone.")[branch]
    return full, {k.removeprefix(prefix): v for k, v in full[branch].items() if k.startswith(prefix)}


def distilled():
    found = ref.vit(2) | dict(dist_token=random(1, 1, WIDTH))
    return found | linear("head", WIDTH, 5) | linear("head_dist", WIDTH, 5)


def unnormed(reference):
    """As models that norm after pooling leave their tokens."""
    return lambda t, x: reference(t, x, last=None)


CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
HALVES = ([0.5] * 3, [0.5] * 3)
NATIVE = f",img_size={SIZE}"
# (what is saved, tensors), the published forward pass, options, mean and std, and what the report must say
LAYOUTS = {
    "MAE": (lambda: under("model", tensors=mae()), ref.plain, "", IMAGENET, ["layout", "MAE"]),
    "MAE with its decoder": (
        lambda: under("model", tensors=mae(), beside=mae_decoder()),
        *(ref.plain, "", IMAGENET),
        ["MAE with its decoder", "decoder: ", "mask token: mask_token"],
    ),
    "MAE, fine-tuned": (
        lambda: under("model", tensors=fine_tuned()),
        *(unnormed(ref.plain), "", IMAGENET),
        ["MAE, fine-tuned", "kept, 7 classes, reads avg"],
    ),
    "MoCo v3": (
        lambda: moco_full()[:2],
        *(ref.plain, "", IMAGENET),
        ["state_dict.base_encoder", "head of the pre-training: head.0.weight and 1 more", "bilinear, crop 0.875"],
    ),
    "MoCo v3, momentum encoder": (lambda: moco_full()[::2], ref.plain, ",take=teacher", IMAGENET, ["momentum_encoder"]),
    "MoCo v3, linear classifier": (
        lambda: under("state_dict", tensors=ref.vit() | dict(pos_embed=moco()) | linear("head", WIDTH, 5)),
        *(ref.plain, "", IMAGENET),
        ["MoCo v3", "5 classes, reads token"],
    ),
    "Sine-cosine positions": (
        lambda: under(tensors=mae(), beside=mae_decoder()),
        *(ref.plain, HALF, HALVES),
        ["Sine-cosine positions", "decoder: "],
    ),
    "DINO, teacher": (
        lambda: dino("teacher"),
        *(ref.plain, "", IMAGENET),
        ["taken from", "teacher.backbone", "beside the backbone: head.mlp.0.weight and 2 more"],
    ),
    "DINO, student": (lambda: dino("student"), ref.plain, ",take=student", IMAGENET, ["student.backbone"]),
    "DINO, backbone only": (
        lambda: under(tensors=ref.vit()),
        *(ref.plain, ",mean=imagenet,std=imagenet", IMAGENET),
        ["timm's names"],
    ),
    "DeiT": (
        lambda: under("model", tensors=ref.vit() | linear("head", WIDTH, 5)),
        *(ref.plain, "", IMAGENET),
        ["DeiT", "5 classes, reads token"],
    ),
    "DeiT, distilled": (lambda: under("model", tensors=distilled()), ref.distilled, "", IMAGENET, ["DeiT, distilled"]),
    "DeiT III": (lambda: under("model", tensors=deit3()), ref.deit3, "", IMAGENET, ["DeiT III"]),
    "BEiT, shared positions": (
        lambda: under("model", tensors=beit(shared=True)),
        *(ref.beit, HALF, HALVES),
        ["head of the pre-training: lm_head.weight and 1 more", "constants", "as the file tells"],
    ),
    "BEiT, positions of each block": (lambda: under("model", tensors=beit()), ref.beit, HALF, HALVES, ["BEiT"]),
    "BEiT, absolute positions": (
        lambda: under("model", tensors=beit(absolute=True)),
        *(ref.beit, f"{GIVEN}{HALF}", HALVES),
        ["BEiT"],
    ),
    "BEiT v2, fine-tuned": (
        lambda: under("module", tensors=beit(tuned=True)),
        *(unnormed(ref.beit), "", IMAGENET),
        ["kept, 7 classes, reads avg"],
    ),
    "BEiT v2, pre-trained": (
        lambda: under("model", tensors=beit(shared=True), beside=norm("cls_pt_layers.0.norm1")),
        *(ref.beit, "", IMAGENET),
        ["layers of the pre-training's head: cls_pt_layers.0.norm1.weight"],
    ),
    "DINOv2": (lambda: under(tensors=dinov2()), ref.dinov2, NATIVE, IMAGENET, ["DINOv2", "mask token: mask_token"]),
    "DINOv2, registers": (lambda: under(tensors=dinov2(4)), ref.dinov2, NATIVE, IMAGENET, ["reg4_dinov2"]),
    "DINOv2, SwiGLU": (lambda: under(tensors=dinov2(4, True)), ref.dinov2, NATIVE, IMAGENET, ["giant"]),
    "DINOv2, training checkpoint": (chunked, ref.dinov2, NATIVE, IMAGENET, ["model.teacher.backbone"]),
    "DINOv3": (lambda: under(tensors=dinov3()), ref.dinov3, NATIVE, IMAGENET, ["DINOv3", "constants"]),
    "DINOv3, SwiGLU": (lambda: under(tensors=dinov3(True)), ref.dinov3, NATIVE, IMAGENET, ["huge_plus"]),
    "OpenCLIP": (
        lambda: under(tensors=openclip()),
        *(lambda t, x: ref.clip(t, x, ref.gelu), ",act_layer=gelu", CLIP),
        ["text tower", "projection to the joint embedding space: visual.proj"],
    ),
    "CLIP of OpenAI": (
        lambda: under("state_dict", tensors=openclip(), prefix="module."),
        *(lambda t, x: ref.clip(t, x, ref.quick_gelu), ",act_layer=quick_gelu", CLIP),
        ["quickgelu"],
    ),
}
TOLD = ("DINOv3", "BEiT")  # whose tensors tell the number of heads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_official_files_give_the_outputs_of_the_published_models(layout, tmp_path, capsys):
    make, reference, options, (mean, std), said = LAYOUTS[layout]
    saved, tensors = make()
    file = tmp_path / "weights.pth"
    torch.save(saved, file)
    expected = reference(tensors, standardised(mean, std))
    heads = "" if layout.startswith(TOLD) else GIVEN
    with torch.no_grad():
        backbone = weights.load(f"{file}{heads}{options}")
        close(tokens(backbone), expected)
        weights.save(backbone, tmp_path / "timm")  # and once more, as a folder of timm's
        close(tokens(weights.load(str(tmp_path / "timm"))), expected)
    table = capsys.readouterr().out
    assert table.startswith(f"Weights of {file}") and all(text in table for text in said), table


HF = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=96, image_size=SIZE)
HF |= dict(patch_size=PATCH)
PROCESSOR = dict(
    image_mean=[0.5, 0.45, 0.4],
    image_std=[0.25, 0.2, 0.3],
    size=dict(shortest_edge=40),
    crop_size=dict(height=SIZE, width=SIZE),
    do_center_crop=True,
    resample=3,
)
# class, its config, how its tokens are found in its output, and what the report must say
FOLDERS = {
    "ViTModel": ("ViTModel", "ViTConfig", {}, ["Hugging Face vit", "pooler"]),
    "ViT, other activation": ("ViTModel", "ViTConfig", dict(hidden_act="quick_gelu"), []),
    "ViT classifier": ("ViTForImageClassification", "ViTConfig", dict(num_labels=7), ["kept, 7 classes, reads token"]),
    "ViTMAE": (
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        dict(
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            mask_ratio=0.0,
        ),
        ["Hugging Face vit_mae", "decoder: "],
    ),
    "DeiT": ("DeiTModel", "DeiTConfig", {}, ["Hugging Face deit"]),
    "DeiT, two classifiers": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", dict(num_labels=7), ["7 classes"]),
    "BEiT": ("BeitModel", "BeitConfig", dict(use_relative_position_bias=True, use_mean_pooling=False), []),
    "BEiT, shared positions": (
        "BeitForMaskedImageModeling",
        "BeitConfig",
        dict(use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=9),
        ["head of the pre-training"],
    ),
    "BEiT classifier": (
        "BeitForImageClassification",
        "BeitConfig",
        dict(use_relative_position_bias=True, num_labels=7),
        ["7 classes, reads avg"],
    ),
    "DINOv2": ("Dinov2Model", "Dinov2Config", {}, ["Hugging Face dinov2"]),
    "DINOv2, SwiGLU": ("Dinov2Model", "Dinov2Config", dict(use_swiglu_ffn=True), ["giant"]),
    "DINOv2 classifier": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        dict(num_labels=7),
        ["classifier, of class token and mean: head.bias and 1 more", "classifier   none"],
    ),
    "DINOv2, registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        dict(num_register_tokens=4),
        ["reg4"],
    ),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", dict(num_register_tokens=4), ["Hugging Face dinov3_vit"]),
    "DINOv3, gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        dict(num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
        ["huge_plus"],
    ),
}


def hugging_face(name, config, options):
    """A model of transformers, every weight perturbed; its whole config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**HF | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@torch.no_grad()
def output(model, images):
    """(tokens of the last layer, logits or None), by transformers itself."""
    kind = type(model).__name__
    base = model if kind.endswith("Model") else getattr(model, model.base_model_prefix)
    kept = {}
    if kind == "BeitForMaskedImageModeling":  # whose last norm stands outside of the base
        model.layernorm.register_forward_hook(lambda module, given, found: kept.update(tokens=found))
        model(images, bool_masked_pos=torch.zeros(len(images), GRID**2, dtype=torch.bool))
        return kept["tokens"], None
    if kind == "ViTMAEForPreTraining":  # which shuffles even what it does not mask: by this noise it does not
        noise = torch.arange(GRID**2).float().expand(len(images), -1)
        return base(images, noise=noise).last_hidden_state, None
    logits = model(images).logits if hasattr(model, "classifier") or hasattr(model, "cls_classifier") else None
    return base(images).last_hidden_state, logits


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_transformers_give_its_outputs(name, tmp_path, capsys):
    cls, config, options, said = FOLDERS[name]
    model = hugging_face(cls, config, options)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    expected, logits = output(model, standardised(PROCESSOR["image_mean"], PROCESSOR["image_std"]))
    with torch.no_grad():
        backbone = weights.load(str(tmp_path / "hf"))
        close(tokens(backbone), expected)
        if backbone.model.num_classes:
            close(backbone.classify(IMAGES), logits)
        weights.save(backbone, tmp_path / "timm")
        close(tokens(weights.load(str(tmp_path / "timm"))), expected)
    view = backbone.evaluation_view
    assert (view.size, view.interpolation, view.crop_mode) == ((SIZE, SIZE), "bicubic", "center")
    assert view.crop_pct == pytest.approx(SIZE / 40)
    table = capsys.readouterr().out
    assert all(text in table for text in [*said, "as config.json tells"]), table


def test_a_folder_in_shards_and_one_without_a_processor(tmp_path):
    model = hugging_face("ViTModel", "ViTConfig", {})
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    with pytest.raises(UserError, match="does not tell with which mean and std .*,mean=imagenet,std=imagenet\\."):
        weights.load(str(tmp_path / "hf"))
    with torch.no_grad():
        found = tokens(weights.load(f"{tmp_path / 'hf'},mean=half,std=half"))
        close(found, output(model, standardised(*HALVES))[0])
    next((tmp_path / "hf").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="lacks model-00.*fetch the whole folder"):
        weights.load(f"{tmp_path / 'hf'},mean=half,std=half")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(model_type="swin"), "is a swin of Hugging Face's, and only vit, vit_mae"),
        (dict(layer_norm_eps=0.1), "has layer_norm_eps=0.1"),
        (dict(hidden_act="relu"), "has hidden_act=relu"),
        (dict(num_attention_heads=None), "does not tell how many heads"),
    ],
)
def test_a_folder_of_what_is_not_known(change, sentence, tmp_path):
    hugging_face("ViTModel", "ViTConfig", {}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    told = {key: value for key, value in (config | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=sentence):
        weights.load(str(tmp_path))


def test_a_folder_of_openclip_tells_activation_and_view(tmp_path):
    tensors = openclip()
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    seen = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bilinear", resize_mode="squash")
    model = dict(quick_gelu=True, vision_cfg=dict(head_width=WIDTH // HEADS, width=WIDTH))
    config = dict(model_cfg=model, preprocess_cfg=seen)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    backbone = weights.load(str(tmp_path))
    with torch.no_grad():
        close(tokens(backbone), ref.clip(tensors, standardised(*HALVES), ref.quick_gelu))
    view = backbone.evaluation_view
    assert (view.interpolation, view.crop_mode, view.crop_pct) == ("bilinear", "squash", 1.0)


# --- what a file does not tell ----------------------------------------------------------------------------------------


def test_what_a_file_does_not_tell_is_asked_for_in_one_sentence(tmp_path):
    file = tmp_path / "vit.pth"
    torch.save(ref.vit(), file)
    with pytest.raises(UserError) as error:
        weights.load(str(file))
    assert str(error.value) == (
        f"{file} does not tell how many heads its attention has and with which mean and std its images were "
        f"standardised: add it, such as {file},num_heads=1,mean=imagenet,std=imagenet."
    )
    with pytest.raises(
        UserError, match=f"does not tell with which .* such as {file},num_heads=3,mean=0.5,std=imagenet"
    ):
        weights.load(f"{file},num_heads=3,mean=0.5")  # what is given is not asked for again
    given = weights.load(f"{file},num_heads=3,mean=0.1,0.2,0.3,std=0.5")
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3]) and given.std.flatten().tolist() == [0.5] * 3


def test_published_widths_have_their_published_heads(tmp_path, capsys):
    torch.save(dict(model=timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict()), tmp_path / "deit.pth")
    backbone = weights.load(str(tmp_path / "deit.pth"))
    assert backbone.model.blocks[0].attn.num_heads == 3 and backbone.name == "vit_tiny_patch16_224"
    assert "heads       3, as published models 192 wide and 12 deep have" in capsys.readouterr().out
    assert backbone.evaluation_view.crop_pct == 0.875 and backbone.evaluation_view.interpolation == "bicubic"


@pytest.mark.parametrize("shape", [(192, 12), (384, 12)])
def test_public_maes_of_a_small_width_differ_in_their_heads(shape, tmp_path):
    width, depth = shape
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=width, depth=depth, num_heads=12, num_classes=0)
    file = tmp_path / "mae.pth"
    model.pos_embed.data[:, 1:] = sincos_positions(width, (14, 14))
    model.pos_embed.data[:, 0] = 0
    torch.save(dict(model=model.state_dict()), file)
    with pytest.raises(UserError, match="does not tell how many heads its attention has: add it, such as .*num_heads="):
        weights.load(str(file))
    found = weights.load(f"{file},num_heads=12").eval()
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        close(found(x), model.eval().forward_features((x - found.mean) / found.std))
    tuned = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in model.state_dict().items()}
    torch.save(dict(model=tuned | dict(pos_embed=random(1, 197, width))), file)
    with pytest.raises(UserError, match="does not tell how many heads"):
        weights.load(str(file))


def test_moco_s_small_vit_has_twelve_heads(tmp_path, capsys):
    model = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0).eval()
    model.pos_embed.data = torch.cat([torch.zeros(1, 1, 384), moco(384, 14)[:, 1:]], 1)
    saved = {f"module.base_encoder.{k}": v for k, v in model.state_dict().items()}
    torch.save(dict(arch="vit_small", state_dict=saved), tmp_path / "moco.pth")
    x = torch.rand(1, 3, 224, 224)
    for given in (",model=vit_small_patch16_224", ""):  # of which timm's has 6
        found = weights.load(f"{tmp_path / 'moco.pth'}{given}").eval()
        with torch.no_grad():
            close(found(x), model.forward_features((x - found.mean) / found.std))
    assert "heads       12, as published models 384 wide and 12 deep have" in capsys.readouterr().out


def test_a_name_without_a_tag_does_not_tell_mean_and_std(tmp_path):
    """timm's vit_small_patch16_224 has four: its own have halves, DINO's ImageNet's."""
    file, name = tmp_path / "w.pth", "vit_small_patch16_224"
    tensors = timm.create_model(name, num_classes=0).state_dict()
    torch.save(tensors, file)
    asked = f"does not tell with which mean and std its images were standardised: add it, such as {file}"
    with pytest.raises(UserError, match=f"{asked},model={name},mean=imagenet,std=imagenet.$"):
        weights.load(f"{file},model={name}")
    for given, mean in (
        (f"{name},mean=clip,std=clip", CLIP[0]),
        (f"{name}.dino", IMAGENET[0]),
        (f"{name}.augreg_in1k", HALVES[0]),
        (f"{name}.dino,mean=half", HALVES[0]),
    ):
        assert weights.load(f"{file},model={given}").mean.flatten().tolist() == pytest.approx(mean)
    torch.save(dict(arch=name, state_dict=tensors), file)
    with pytest.raises(UserError, match=f"{asked},mean=imagenet,std=imagenet.$"):
        weights.load(str(file))
    torch.save(dict(teacher=tensors), file)  # the layout tells what the name does not
    assert weights.load(f"{file},model={name}").mean.flatten().tolist() == pytest.approx(IMAGENET[0])


def test_a_named_model_of_other_patches_is_refused_and_other_positions_are_told(tmp_path, capsys):
    file = tmp_path / "dino8.pth"
    model = timm.create_model("vit_small_patch8_224", num_classes=0)
    torch.save(model.state_dict(), file)
    for name in ("vit_small_patch16_224.dino", "vit_small_patch16_224.augreg_in1k"):
        right = name.replace("16_224.augreg_in1k", "8_224").replace("16_224", "8_224")  # which is with DINO's tag alone
        said = f"has patches of 8x8 pixels, and {name} of 16x16: name the model that it is, .*,model={right}.$"
        with pytest.raises(UserError, match=said):
            weights.load(f"{file},model={name}")
    assert torch.equal(weights.load(f"{file},model=vit_small_patch8_224.dino").model.pos_embed, model.pos_embed)
    assert "positions" not in capsys.readouterr().out
    larger = timm.create_model("vit_small_patch16_384", num_classes=0)
    torch.save(larger.state_dict(), file)
    found = weights.load(f"{file},model=vit_small_patch16_224.dino")
    expected = timm.layers.resample_abs_pos_embed(larger.pos_embed, (14, 14), (24, 24), num_prefix_tokens=1)
    assert torch.equal(found.model.pos_embed, expected) and found.input_size == (224, 224)
    assert "positions   of images of 384x384, resampled to 224x224" in capsys.readouterr().out
    found = weights.load(f"{file},model=vit_small_patch16_224.dino,img_size=384")
    assert torch.equal(found.model.pos_embed, larger.pos_embed) and found.input_size == (384, 384)
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=112, num_classes=0)  # resampled by timm
    torch.save(eva.state_dict(), file)
    capsys.readouterr()
    assert weights.load(f"{file},model=eva02_tiny_patch14_224.mim_in22k").input_size == (224, 224)
    assert "positions   resampled by timm: pos_embed" in capsys.readouterr().out


QUICK = "vit_base_patch16_clip_quickgelu_224.openai"


def test_weights_that_timm_builds_with_another_activation_are_refused(tmp_path, monkeypatch):
    """timm's notes say so; no weights are fetched."""
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *args, **options: None)
    with pytest.raises(UserError, match=f"was trained with QuickGELU, and timm's .* has GELU: take {QUICK}.$"):
        weights.load("vit_base_patch16_clip_224.openai")
    act = weights.load(QUICK).model.blocks[0].mlp.act
    assert type(act).__name__ == "QuickGELU"
    file = tmp_path / "clip.pth"
    torch.save(openclip(), file)
    with pytest.raises(UserError, match=f"QuickGELU, .*: take {file},model={QUICK}.$"):
        weights.load(f"{file},model=vit_base_patch16_clip_224.openai")
    weights.save(small(), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["architecture"] = "vit_base_patch16_clip_224"
    config["pretrained_cfg"] |= dict(tag="openai", notes=["natively QuickGELU, use quickgelu model variant"])
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"folder was trained with QuickGELU, .*: take {QUICK}.$"):
        weights.load(str(tmp_path / "folder"))
    known = timm.list_models(pretrained=True)
    for name in known:  # the model that is offered is there
        notes = timm.get_pretrained_cfg(name).notes or ()
        if "quickgelu" not in name and any("QuickGELU" in note for note in notes):
            assert name.replace("_clip_", "_clip_quickgelu_") in known


@pytest.mark.parametrize("kind", ["timm", "transformers", "shards", "OpenCLIP"])
def test_a_file_of_a_folder_is_read_as_the_folder(kind, tmp_path):
    folder = tmp_path / "folder"
    if kind == "timm":
        recipe = ["backbone.pos_embed=sincos", "backbone.num_heads=6", "data.mean=[0.3, 0.3, 0.3]"]
        weights.save(small(*recipe), folder)
    elif kind == "OpenCLIP":
        folder.mkdir()
        save_file(openclip(), folder / "open_clip_model.safetensors")
        config = dict(model_cfg=dict(quick_gelu=True, vision_cfg=dict(head_width=WIDTH // HEADS)))
        (folder / "open_clip_config.json").write_text(
            json.dumps(config | dict(preprocess_cfg=dict(mean=[0.3], std=[1])))
        )
    else:
        model = hugging_face("ViTModel", "ViTConfig", {})
        model.save_pretrained(folder, max_shard_size="40KB" if kind == "shards" else "5GB")
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    file = next(folder.glob("*.safetensors"))
    with torch.no_grad():
        assert torch.equal(tokens(weights.load(str(file))), tokens(weights.load(str(folder))))
    if kind == "timm":
        with pytest.raises(UserError, match="itself tells its num_heads: leave out"):
            weights.load(f"{file},num_heads=3")
    torch.save(ref.vit(), folder / "other.pth")  # which is not the folder's
    with pytest.raises(UserError, match="other.pth does not tell how many heads .* and with which mean and std"):
        weights.load(str(folder / "other.pth"))


def test_timm_s_names_with_and_without_positions_of_prefix_tokens(tmp_path):
    """DeiT III, whose class token has none, and registers that have some."""
    shape = dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, img_size=SIZE, patch_size=PATCH, num_classes=0)
    for name, options, count in (
        ("deit3_small_patch16_224", {}, GRID**2),
        ("vit_small_patch16_224", dict(reg_tokens=4), GRID**2 + 5),
        ("vit_small_patch16_224", dict(reg_tokens=4, no_embed_class=True), GRID**2),
    ):
        model = timm.create_model(name, **shape, **options).eval()
        assert model.pos_embed.shape[1] == count
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        backbone = weights.load(f"{tmp_path / 'w.pth'}{GIVEN}{HALF}").eval()
        with torch.no_grad():
            close(backbone(IMAGES), model.forward_features(standardised(*HALVES)))


@pytest.mark.parametrize("options", [{}, dict(init_values=0.1), dict(reg_tokens=2), dict(no_embed_class=True)])
def test_grids_that_are_no_squares_are_asked_for(options, tmp_path):
    """4x6 patches and the class token have 25 positions, as 5x5 patches without it."""
    shape = dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, img_size=(32, 48), patch_size=PATCH, num_classes=0)
    model = timm.create_model("vit_small_patch16_224", **shape, **options).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    source, images = f"{tmp_path / 'w.pth'}{GIVEN}{HALF}", torch.rand(2, 3, 32, 48)
    if "init_values" not in options:  # with layer scales it may be DeiT III
        with pytest.raises(
            UserError, match="does not tell the sides of its 2[0-9] positions: .*,img_size=HEIGHT,WIDTH"
        ):
            weights.load(source)
    backbone = weights.load(f"{source},img_size=32,48").eval()
    with torch.no_grad():
        close(backbone(images), model.forward_features((images - 0.5) / 0.5))


def test_the_name_of_a_timm_model_tells_all(tmp_path, capsys):
    model = timm.create_model("test_resnet.r160_in1k", num_classes=4).eval()
    file = tmp_path / "cnn.pth"
    torch.save(dict(state_dict=model.state_dict(), arch="resnet", epoch=3), file)
    with pytest.raises(UserError, match="holds the weights of a ResNet.*,model=resnet50.tv_in1k"):  # arch is no name
        weights.load(str(file))
    backbone = weights.load(f"{file},model=test_resnet.r160_in1k").eval()
    assert backbone.input_size == (160, 160) and backbone.evaluation_view.crop_pct == 0.95
    x = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(backbone.classify(x), model(backbone.normalise(x)))
    assert "test_resnet.r160_in1k, as given" in capsys.readouterr().out
    torch.save(dict(state_dict=model.state_dict(), arch="test_resnet.r160_in1k"), file)  # as timm's own training saves
    with torch.no_grad():
        assert torch.equal(weights.load(str(file)).eval().classify(x), model(backbone.normalise(x)))


def test_a_named_model_takes_the_names_of_its_official_file(tmp_path):
    full = timm.create_model("deit3_small_patch16_224", num_classes=5)
    state = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in full.state_dict().items()}
    torch.save(dict(model=state), tmp_path / "small.pth")
    named = weights.load(f"{tmp_path / 'small.pth'},model=deit3_small_patch16_224")
    assert all(torch.equal(v, full.state_dict()[k]) for k, v in named.model.state_dict().items())
    with pytest.raises(UserError, match="read as deit3_medium_patch16_224 .* has in another shape"):
        weights.load(f"{tmp_path / 'small.pth'},model=deit3_medium_patch16_224")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (",num_head=3", "Weights have no option 'num_head' .* Did you mean 'num_heads'"),
        (",num_heads=none", "num_heads=none in .* must be the number of attention heads"),
        (",mean=0.5,x", "mean=0.5,x in .* must be imagenet | half | clip, or a number per channel"),
        (f"{GIVEN},mean=0.5,0.5,std=half", "takes 3 channels and mean has 2 values"),
        (f"{GIVEN}{HALF},take=student", "holds no student: leave out ,take=student"),
        (f"{GIVEN}{HALF},global_pool=max", "global_pool=max in .* must be token | avg"),
        (",model=vit_tiny_patch16_22", "timm has no model .* Did you mean 'vit_tiny_patch16_224"),
        (f",num_heads=5{HALF}", "timm cannot build vit_base_patch16_224 for .*: change or leave out num_heads=5."),
        (f"{GIVEN}{HALF},img_size=36", "Images of 36x36 do not divide into the patches .*: use images of 32x32"),
    ],
)
def test_options_that_cannot_be(option, sentence, tmp_path):
    torch.save(ref.vit(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=sentence):
        weights.load(f"{tmp_path / 'vit.pth'}{option}")


def test_an_option_that_changes_nothing_is_refused(tmp_path):
    torch.save(dict(model=beit()), tmp_path / "beit.pth")
    with pytest.raises(UserError, match="act_layer changes nothing for .*: leave it out"):
        weights.load(f"{tmp_path / 'beit.pth'}{HALF},act_layer=gelu")
    with pytest.raises(UserError, match="itself tells its num_heads: leave out"):
        weights.load("vit_tiny_patch16_224,num_heads=3")


def test_positions_are_resampled_to_the_size_that_is_asked_for(tmp_path, capsys):
    tensors = mae()
    torch.save(dict(model=tensors), tmp_path / "mae.pth")
    backbone = weights.load(f"{tmp_path / 'mae.pth'}{GIVEN},img_size=64,48")
    expected = timm.layers.resample_abs_pos_embed(tensors["pos_embed"], (8, 6), (GRID, GRID), num_prefix_tokens=1)
    assert torch.equal(backbone.model.pos_embed, expected) and backbone.evaluation_view.size == (64, 48)
    assert "positions   of images of 32x32, resampled to 64x48" in capsys.readouterr().out


def test_as_many_positions_in_another_grid_are_resampled_too(tmp_path):
    tensors = ref.vit()
    torch.save(tensors, tmp_path / "vit.pth")
    found = weights.load(f"{tmp_path / 'vit.pth'}{GIVEN}{HALF},img_size=16,64").model.pos_embed
    assert torch.equal(
        found, timm.layers.resample_abs_pos_embed(tensors["pos_embed"], (2, 8), (GRID, GRID), num_prefix_tokens=1)
    )


def test_images_that_do_not_divide_into_patches_are_refused_from_every_source(tmp_path):
    """Their border would not be seen."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    weights.save(small(), tmp_path / "run" / "backbone")
    torch.save(dict(model=beit()), tmp_path / "beit.pth")
    for source in ("run", "run/backbone", f"beit.pth{HALF}"):
        with pytest.raises(UserError, match="Images of 36x23 do not divide into .* of 8x8 pixels: use images of 32x16"):
            weights.load(f"{tmp_path / source},img_size=36,23")
    assert weights.load(f"{tmp_path / 'run'},img_size=40").input_size == (40, 40)


def test_a_tensor_too_many_or_too_few_is_named(tmp_path):
    file = tmp_path / "mae.pth"
    torch.save(dict(model=mae() | {"blocks.0.attn.q_norm.weight": random(3), "extra": random(1)}), file)
    with pytest.raises(
        UserError, match=r"\(MAE\), and against that it has blocks.0.attn.q_norm.weight and 1 more: name"
    ):
        weights.load(f"{file}{GIVEN}")
    torch.save(dict(model={k: v for k, v in mae().items() if k != "blocks.1.norm2.bias"}), file)
    with pytest.raises(UserError, match="it lacks blocks.1.norm2.bias: name"):
        weights.load(f"{file}{GIVEN}")


@pytest.mark.parametrize("missing", ["head", "head_dist"])
def test_a_distilled_model_with_one_head_is_refused(missing, tmp_path):
    """As a file and as timm's folder; without both it has no classifier."""
    whole = distilled()
    [other] = {"head", "head_dist"} - {missing}
    file = tmp_path / "w.pth"
    torch.save(dict(model={k: v for k, v in whole.items() if not k.startswith(f"{missing}.")}), file)
    said = f"holds a distilled model with {other} and without {missing}, .* remove {other}.weight and {other}.bias too"
    with pytest.raises(UserError, match=said):
        weights.load(f"{file}{GIVEN}")
    torch.save(dict(model={k: v for k, v in whole.items() if not k.startswith("head")}), file)
    assert weights.load(f"{file}{GIVEN}").model.num_classes == 0

    torch.save(dict(model=whole), file)
    folder = tmp_path / "folder"
    weights.save(weights.load(f"{file}{GIVEN}"), folder)
    stored = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in stored.items() if not k.startswith(f"{missing}.")}, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"folder {said}"):
        weights.load(str(folder))
    with pytest.raises(UserError, match=f"folder {said}"):
        weights.initialise(small(), str(folder))


# --- files that hold no weights ---------------------------------------------------------------------------------------


def zipped(folder):
    file = folder / "file.pth"
    torch.save(mae(), file)
    return file.read_bytes()


def resnet():
    return timm.create_model("test_resnet").state_dict() | {"layer1.0.conv1.weight": random(1)}


BAD = {
    "empty": (lambda f: b"", "is empty: fetch or copy it again"),
    "text": (lambda f: b"<html>not found</html>", "is a text and no weights: pass a .pth"),
    "lfs": (
        lambda f: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "pointer of Git LFS .*: run git lfs pull",
    ),
    "picture": (lambda f: b"\x89PNG\r\n\x1a\n\0\0", "is no file of PyTorch: pass a .pth"),
    "truncated": (lambda f: zipped(f)[:9000], "is damaged or not whole: fetch or copy it again"),
    "torchscript": (lambda f: torch.jit.script(torch.nn.Linear(1, 1)), "is a TorchScript program .*torch.jit.load"),
    "module": (lambda f: torch.nn.Linear(1, 1), r"is a pickle of Python objects \(torch.nn.*weights_only=False"),
    "resnet": (lambda f: resnet(), "holds the weights of a ResNet.*: name the timm model, such as .*,model=resnet50"),
    "other": (lambda f: {"encoder.weight": random(1)}, "of no layout that is known here .*docs/weights.md"),
    "lora": (lambda f: {"base_model.model.q.lora_A.weight": random(1)}, "LoRA adapters .*merge_and_unload"),
    "optimizer": (
        lambda f: dict(state={0: {}}, param_groups=[{}]),
        "state of an optimizer and no weights: pass the file",
    ),
    "optimizer, within": (
        lambda f: dict(optimizer=dict(state={}, param_groups=[{}]), epoch=1),
        "state of an optimizer",
    ),
    "number": (lambda f: 3, "holds no weights by name: pass the state dict"),
    "names of transformers": (
        lambda f: {"vit.encoder.layer.0.attention.attention.query.weight": random(1)},
        "names of Hugging Face's transformers: pass its folder",
    ),
    "two": (
        lambda f: {f"{k}.patch_embed.proj.weight": random(1) for k in ("image", "depth")},
        r"holds several backbones \(image. and depth.\): save the one",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_without_weights_is_one_sentence(kind, tmp_path):
    make, sentence = BAD[kind]
    file, content = tmp_path / "weights.pth", make(tmp_path)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, torch.jit.ScriptModule):
        content.save(file)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=sentence) as error:
        weights.load(str(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


class Trap:
    def __reduce__(self):
        return (open, (os.environ["TRAP"], "w"))


def test_no_pickle_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    for legacy in (True, False):
        torch.save(dict(model=mae(), x=Trap()), tmp_path / "trap.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match="could run any code"):
            weights.load(str(tmp_path / "trap.pth"))
        assert not (tmp_path / "sprung").exists()


def test_damaged_safetensors_and_folders(tmp_path):
    save_file(mae(), tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="x.safetensors is damaged or not whole"):
        weights.load(str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="holds no model.safetensors, pytorch_model.bin, .*: pass a .pth"):
        weights.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read .*fetch the folder again"):
        weights.load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="LoRA adapters"):
        weights.load(str(tmp_path))


# --- used: --init-from and the evaluators -----------------------------------------------------------------------------


def run(script, *arguments, cwd, env=None):
    """A script of ours, or python's -c, in a process of its own."""
    command = [sys.executable, script if script == "-c" else str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment() | (env or {}), capture_output=True, text=True)


def small(*settings):
    shape = ["backbone.embed_dim=48", "backbone.depth=2", "backbone.num_heads=3", "backbone.patch_size=8"]
    facts = ["data.img_size=32", "data.in_chans=3", "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"]
    recipe = objectives.read_recipe("mae", [*shape, *facts, "backbone.pos_embed=learned", *settings], None)
    return backbones.build(recipe.backbone, recipe.data, seed=0)


@pytest.mark.parametrize(
    ("layout", "settings", "said"),
    [
        ("MAE with its decoder", [], ""),
        ("DINO, teacher", [], ""),
        ("DeiT", [], ""),
        ("DeiT III", ["backbone.init_values=0.1"], ""),  # whose class token has no position
        ("DINOv2, registers", ["backbone.init_values=0.1", "backbone.reg_tokens=4"], ""),
        ("MAE, fine-tuned", [], "Their last norm stood after pooling and here before it: it is where norm starts."),
    ],
)
def test_a_run_starts_from_official_files(layout, settings, said, tmp_path, capsys):
    make, reference, options, (mean, std), _ = LAYOUTS[layout]
    saved, tensors = make()
    torch.save(saved, tmp_path / "w.pth")
    backbone = weights.initialise(small(*settings), f"{tmp_path / 'w.pth'}{GIVEN}{options}")
    if said:
        assert said in capsys.readouterr().out
        tensors, reference = {k.replace("fc_norm.", "norm."): v for k, v in tensors.items()}, ref.plain
    with torch.no_grad():
        close(tokens(backbone), reference(tensors, standardised(mean, std)))


def test_the_activation_given_with_weights_goes_on_with_them(tmp_path):
    file = tmp_path / "vit.pth"
    torch.save(ref.vit(), file)
    source = f"{file}{GIVEN}{HALF},act_layer=quick_gelu"
    expected = tokens(weights.load(source))
    backbone = weights.initialise(small(), source)
    with torch.no_grad():
        close(tokens(backbone), expected)
        weights.save(backbone, tmp_path / "run")
        close(tokens(weights.load(str(tmp_path / "run"))), expected)
        close(tokens(weights.initialise(small(), str(tmp_path / "run"))), expected)


def test_weights_of_other_functions_are_refused_with_their_name(tmp_path):
    """Whose tensors are the same."""
    quick, plain = QUICK.partition(".")[0], "vit_base_patch16_clip_224"
    shape = ["backbone.embed_dim=48", "backbone.depth=2", "backbone.num_heads=3", "backbone.patch_size=8"]
    weights.save(small(f"backbone.name={quick}", *shape), tmp_path / "w")
    with pytest.raises(UserError, match="trained with another activation: set (.*)[.]") as error:
        weights.initialise(small(f"backbone.name={plain}", *shape), str(tmp_path / "w"))
    remedy = str(error.value).rpartition("set ")[2].rstrip(".").split()
    assert remedy == [f"backbone.name={quick}", *shape]
    weights.initialise(small(*remedy), str(tmp_path / "w"))
    other = small(*remedy)
    for part in other.model.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 1e-3
    with pytest.raises(UserError, match="trained with another eps of the norms: set backbone.name="):
        weights.initialise(other, str(tmp_path / "w"))


def test_positions_of_prefix_tokens_move_into_models_without_them(tmp_path):
    """The other way about: a plain ViT into DeiT III, whose class token takes its position in."""
    tensors = ref.vit() | scales("ls1.gamma", "ls2.gamma")
    torch.save(dict(model=tensors | linear("head", WIDTH, 5)), tmp_path / "w.pth")
    settings = ["backbone.name=deit3_small_patch16_224", "backbone.embed_dim=48", "backbone.depth=2"]
    new = small(*settings, "backbone.num_heads=3", "backbone.patch_size=8")
    assert new.model.no_embed_class
    backbone = weights.initialise(new, f"{tmp_path / 'w.pth'}{GIVEN}")
    with torch.no_grad():
        close(tokens(backbone), ref.plain(tensors, standardised(*IMAGENET), scales=("ls1.gamma", "ls2.gamma")))


def test_what_a_plain_vit_does_not_have_is_refused_with_the_name(tmp_path):
    for name, options, model in (
        ("BEiT, shared positions", HALF, "beit_base_patch16_224"),
        ("OpenCLIP", "", "vit_base"),
    ):
        torch.save(LAYOUTS[name][0]()[0], tmp_path / "w.pth")
        given = "" if name.startswith("BEiT") else f"{GIVEN},act_layer=gelu"
        with pytest.raises(UserError, match=f"is in the weights alone.*: set backbone.name={model}"):
            weights.initialise(small(), f"{tmp_path / 'w.pth'}{given}{options}")


def test_evaluators_take_a_file_and_its_options(tmp_path):
    torch.save(ref.vit(), tmp_path / "vit.pth")
    sources = [f"vit.pth{GIVEN}{HALF}", f"vit.pth{GIVEN},mean=imagenet,std=imagenet"]
    done = run("eval/knn.py", "--backbone", *sources, "--data", "digits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("timm's names") == 2 and "as given" in done.stdout
    folders = sorted((tmp_path / "runs").iterdir())  # the rows of different means do not mix
    assert len(folders) == 2 and all(f.name.startswith("vit.pth-") for f in folders)


# --- the hub, by a stand-in -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A server that answers as the Hugging Face hub does for the files of a folder OWNER/NAME, and its environment."""
    root = tmp_path / "hub"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            owner, name, _, revision, file = self.path.strip("/").split("?")[0].split("/", 4)
            path = root / owner / name / file
            known = path.parent.is_dir()
            code = (
                "GatedRepo"
                if owner == "gated"
                else None
                if path.is_file()
                else "EntryNotFound"
                if known
                else "RepoNotFound"
            )
            self.send_response(200 if code is None else 403 if owner == "gated" else 404)
            self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
            content = path.read_bytes() if code is None else b""
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if body else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = dict(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "cache")
    )
    yield root, environment
    server.shutdown()


LOAD = """
import sys
from ssl_vit import errors, weights
for name in sys.argv[1:]:
    try:
        model = weights.load(name).model
        print("loaded", model.pretrained_cfg["architecture"], float(model.norm.weight.detach().sum()))
    except errors.UserError as error:
        print("error", error)
"""


def test_models_on_the_hub(hub, tmp_path):
    """Real names, by huggingface_hub itself: transformers' and timm's folders, a revision, and what is not there."""
    root, environment = hub
    model = hugging_face("ViTMAEForPreTraining", "ViTMAEConfig", FOLDERS["ViTMAE"][2])
    model.save_pretrained(root / "facebook" / "vit-mae-base")
    (root / "facebook" / "vit-mae-base" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    weights.save(small(), root / "timm" / "vit_small_patch16_224.ours")
    total = float(model.vit.layernorm.weight.detach().sum())
    names = ["facebook/vit-mae-base@main", "hf-hub:timm/vit_small_patch16_224.ours", "timm/vit_small_patch16_224.ours"]
    online = run("-c", LOAD, *names, "gated/model", "nobody/nothing", cwd=tmp_path, env=environment)
    unreachable = environment | dict(HF_ENDPOINT="http://127.0.0.1:9")  # what was fetched still loads
    offline = run("-c", LOAD, names[0], "nobody/nothing", cwd=tmp_path, env=unreachable)
    assert online.returncode == offline.returncode == 0, online.stderr + offline.stderr
    assert f"Weights of {names[0]}:" in online.stdout
    *loaded, gated, nobody = [x for x in online.stdout.splitlines() if x.startswith(("loaded", "error"))]
    assert float(loaded[0].split()[2]) == pytest.approx(total)
    assert loaded[1:] == ["loaded vit_tiny_patch16_224 48.0"] * 2
    assert gated.startswith("error gated/model is given to those who accept its licence: accept it at http")
    assert "no model of that name on the Hugging Face hub: check the name" in nobody
    assert loaded[0] in offline.stdout
    assert "the Hugging Face hub did not give it (LocalEntryNotFoundError): check the name" in offline.stdout


def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no run, file, folder or timm model 'runs/mae'"):
        weights.load("runs/mae")


def test_the_page_has_the_layouts_of_the_table():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", (ROOT / "docs" / "weights.md").read_text(), re.M)
    rows = [row for row in rows if row[0] in {layout.name for layout in layouts.LAYOUTS}]
    assert rows == [(layout.name, layout.signs) for layout in layouts.LAYOUTS]


@pytest.mark.parametrize("teacher, student", [
    ("teacher_backbone.", "student_backbone."),  # Lightning modules as lightly's examples write them
    ("momentum_backbone.", "backbone."),  # solo-learn
    ("backbone_momentum.", "backbone."),  # lightly
    ("teacher.backbone.", "student.backbone."),
    ("module.momentum_encoder.", "module.base_encoder."),
])  # fmt: skip
def test_either_branch_of_a_self_distillation_is_taken(teacher, student, tmp_path):
    mine, other = ref.vit(), {name: value + 1 for name, value in ref.vit().items()}
    state = {student + name: value for name, value in mine.items()}
    state |= {teacher + name: value for name, value in other.items()} | {"student_head.weight": torch.zeros(3, 3)}
    torch.save(dict(state_dict=state, epoch=3), path := tmp_path / "last.ckpt")
    for take, expected in (("student", mine), ("teacher", other)):
        found = reading.read(path, take).tensors
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    if "backbone." == student:
        with pytest.raises(UserError, match="several backbones.*: append ,take=teacher or ,take=student"):
            reading.read(path)


def test_a_file_without_the_branch_is_refused(tmp_path):
    path, state = tmp_path / "x.pth", {f"backbone.{name}": value for name, value in ref.vit().items()}
    torch.save(dict(state_dict=state), path)
    for take in ("teacher", "student"):
        with pytest.raises(UserError, match=f"holds no {take}: leave out ,take={take}"):
            reading.read(path, take)
