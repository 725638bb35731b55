"""The features that evaluators see against timm's own `forward_features`, for its families of models."""

import pytest
import timm
import torch

from eval.features import Source, pool
from ssl_vit import backbone as backbones

SMALL = dict(embed_dim=48, depth=2, num_heads=2)
# model, what makes it small, layout of its forward_features: NCHW, NHWC, or the number of prefix tokens
FAMILIES = [
    ("vit_small_patch14_reg4_dinov2", dict(img_size=56, **SMALL), 5),
    ("vit_so150m2_patch16_reg1_gap_256", dict(img_size=32, **SMALL), 1),
    ("deit_tiny_distilled_patch16_224", dict(img_size=32, **SMALL), 2),
    ("vit_small_patch16_dinov3", dict(img_size=32, **SMALL | dict(embed_dim=64)), 5),
    ("eva02_tiny_patch14_224", dict(img_size=28, **SMALL), 1),
    ("beit_base_patch16_224", dict(img_size=32, **SMALL), 1),
    ("vit_relpos_base_patch16_224", dict(img_size=32, **SMALL), 0),
    ("cait_xxs24_224", dict(img_size=32, **SMALL), 1),
    ("xcit_nano_12_p16_224", dict(img_size=32, **SMALL), 1),
    ("swin_tiny_patch4_window7_224", dict(img_size=64, embed_dim=24, depths=(1, 1, 1, 1)), "NHWC"),
    ("mvitv2_tiny", dict(img_size=64), 0),
    ("twins_svt_small", dict(img_size=64), 0),
    ("maxvit_pico_rw_256", dict(img_size=64), "NCHW"),
    ("resnetv2_50x1_bit", dict(), "NCHW"),
]


def perturb(model: torch.nn.Module) -> None:
    """Make every norm, bias and token matter, so that one which is left out shows."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "token" in name or "norm" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=random))


def expected(model: torch.nn.Module, images: torch.Tensor, layout: str | int) -> dict[str, torch.Tensor]:
    """Features by pooling, from forward_features and what is known of the model's layout."""
    found = model.forward_features(images)
    if layout == "NCHW":
        return dict(mean=found.mean((2, 3)))
    if layout == "NHWC":
        return dict(mean=found.mean((1, 2)))
    has_class = layout > 0 and "reg1_gap" not in model.pretrained_cfg["architecture"]
    mean = dict(mean=found[:, layout:].mean(1))
    return mean | dict(cls=found[:, 0]) if has_class else mean


def agree(backbone: backbones.Backbone, layout: str | int) -> float:
    """The largest difference of the last block's features, pooled as evaluators do, relative to timm's own maximum."""
    size = backbone.input_size
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    source = Source("x", None, {}, backbone, size)
    with torch.no_grad():
        want = expected(backbone.model, (images - backbone.mean) / backbone.std, layout)
        found = pool(source, images, [backbone.depth - 1])
        together = pool(source, images, [0, backbone.depth - 1])  # an earlier block asked for beside it
    assert {pooling for _, pooling in found} == want.keys()
    worst = 0.0
    for (block, pooling), value in found.items():
        assert torch.equal(together[block, pooling], value)
        worst = max(worst, ((value - want[pooling]).abs().max() / want[pooling].abs().max()).item())
    return worst


@pytest.mark.parametrize(("name", "args", "layout"), FAMILIES, ids=[name for name, _, _ in FAMILIES])
def test_the_last_block_s_features_are_timm_s_own(name, args, layout):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **args)
    perturb(model)
    model.pretrained_cfg = model.pretrained_cfg | dict(input_size=(3, *[args.get("img_size", 64)] * 2))
    backbone = backbones.wrap(model, [0.5, 0.45, 0.4], [0.25, 0.2, 0.3], args).eval()
    assert agree(backbone, layout) < 1e-5
