"""Backbones: base.py is the contract, vit.py the plain ViT whose tokens objectives work on, factory.py builds them."""

from ssl_vit.backbones.base import (
    CAPABILITIES,
    FAULTS,
    REMEDIES,
    Backbone,
    Capability,
    Replacement,
    evaluating,
    reason,
)
from ssl_vit.backbones.eva import EvaBackbone
from ssl_vit.backbones.factory import build, build_name, resolve_patch, wrap
from ssl_vit.backbones.local import LocalBackbone
from ssl_vit.backbones.swin import SwinBackbone
from ssl_vit.backbones.vit import TokenBackbone, check_tokens, fix_sincos_positions, sincos_positions, xavier

__all__ = [
    "CAPABILITIES",
    "FAULTS",
    "REMEDIES",
    "Backbone",
    "Capability",
    "EvaBackbone",
    "LocalBackbone",
    "Replacement",
    "SwinBackbone",
    "TokenBackbone",
    "build",
    "build_name",
    "check_tokens",
    "evaluating",
    "fix_sincos_positions",
    "reason",
    "resolve_patch",
    "sincos_positions",
    "wrap",
    "xavier",
]
