"""Small builds of timm's models for small images: a Swin, a hybrid of ResNet and ViT, and ResNets.

    timm.create_model("ssl_vit_swin", img_size=32, num_classes=10)

timm's own start with a stride of 4 and end with one of 32, which leaves one patch of a 32 px image.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import GroupNorm, HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def _cfg(first_conv: str, classifier: str) -> dict[str, Any]:
    half = (0.5, 0.5, 0.5)
    facts = dict(num_classes=0, input_size=(3, 32, 32), crop_pct=1.0, interpolation="bilinear", mean=half, std=half)
    return facts | dict(first_conv=first_conv, classifier=classifier)


default_cfgs = generate_default_cfgs(
    {
        "ssl_vit_swin": _cfg("patch_embed.proj", "head.fc"),
        "ssl_vit_hybrid": _cfg("patch_embed.backbone.conv", "head"),
        "ssl_vit_resnet18": _cfg("conv1", "fc"),
        "ssl_vit_resnet50": _cfg("conv1", "fc"),
    }
)


@register_model
def ssl_vit_swin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Swin (Liu et al. 2021, arXiv 2103.14030) with windows of 4x4, for 32 px in three stages."""
    shape = dict(img_size=32, patch_size=2, window_size=4, embed_dim=48, depths=(2, 2, 2), num_heads=(3, 6, 12))
    return _build(SwinTransformer, "ssl_vit_swin", pretrained, shape | kwargs, checkpoint_filter_fn)


@register_model
def ssl_vit_hybrid(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A residual stem and a ViT on its feature map (Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1).

    patch_size: pixels of a side of a token; the stem's stride is a half of it, of even ones, and at most 4.
    """
    shape = dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3) | kwargs
    side: int = shape.pop("patch_size")
    stride = next(s for s in (4, 2, 1) if side % (2 * s) == 0 or s == 1)
    if side == 2:
        stride = 2
    embed = partial(HybridEmbed, backbone=ResidualStem(shape.get("in_chans", 3), stride))
    return _build(
        VisionTransformer, "ssl_vit_hybrid", pretrained, shape | dict(patch_size=side // stride, embed_layer=embed)
    )


class ResidualStem(nn.Module):
    """A convolution and two residual blocks, of 64 channels in groups that are normalised (GroupNorm, as in BiT)."""

    def __init__(self, in_chans: int, stride: int):
        super().__init__()
        norm: Any = GroupNorm
        width = 64
        self.conv = nn.Conv2d(in_chans, width, 3, stride=min(stride, 2), padding=1, bias=False)
        self.norm = norm(width)
        self.act = nn.ReLU(inplace=True)
        down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width, width, 1, bias=False), norm(width))
        self.blocks = nn.Sequential(
            BasicBlock(width, width, stride // 2 or 1, down if stride == 4 else None, norm_layer=norm),
            BasicBlock(width, width, norm_layer=norm),
        )

    def forward(self, x: Any) -> Any:
        """(B, C, H, W) → (B, width, H / stride, W / stride)."""
        return self.blocks(self.act(self.norm(self.conv(x))))


class SmallResNet(ResNet):
    """A ResNet whose stem keeps the images' resolution: a 3x3 convolution and no pooling (He et al. 2016, arXiv
    1512.03385, section 4.2). channels: of the four stages; the stem has those of the first. output_stride: 32, 16 or 8
    before that, and so 8, 4 or 2."""

    feature_info: list[dict[str, Any]]

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512), **kwargs: Any):
        width = channels[0]
        # a deep stem, replaced below, is the one whose width timm lets one choose
        super().__init__(channels=tuple(channels), stem_type="deep", stem_width=width // 2, **kwargs)
        stem = nn.Conv2d(kwargs.get("in_chans", 3), width, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)


@register_model
def ssl_vit_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 for small images."""
    return _build(SmallResNet, "ssl_vit_resnet18", pretrained, dict(block=BasicBlock, layers=(2, 2, 2, 2)) | kwargs)


@register_model
def ssl_vit_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 for small images."""
    return _build(SmallResNet, "ssl_vit_resnet50", pretrained, dict(block=Bottleneck, layers=(3, 4, 6, 3)) | kwargs)


def _build(
    cls: type[nn.Module], name: str, pretrained: bool, args: dict[str, Any], adapt: Callable[..., Any] | None = None
) -> nn.Module:
    model: nn.Module = build_model_with_cfg(cls, name, pretrained, pretrained_filter_fn=adapt, **args)
    return model
