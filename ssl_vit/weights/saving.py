"""A backbone as a folder that plain timm loads: `timm.create_model("local-dir:RUN/backbone", pretrained=True)`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssl_vit import files
from ssl_vit.backbones import Backbone


def save(backbone: Backbone, folder: Path, classes: list[str] | None = None) -> None:
    """Write the timm model, its mean, std and evaluation view into `folder`, which appears whole or not at all.

    classes: the names of a classifier's classes, where timm keeps them (label_names).

    Raises UserError if the disk is full.
    """
    model, view = backbone.model, backbone.evaluation_view
    published = model.pretrained_cfg
    config: dict[str, Any] = dict(
        architecture=published["architecture"],
        num_classes=model.num_classes,
        num_features=model.num_features,
        model_args=backbone.args,
        # the model's own, and not those of the published model of the same architecture
        pretrained_cfg=dict(
            mean=backbone.mean.flatten().tolist(),
            std=backbone.std.flatten().tolist(),
            input_size=[len(backbone.mean), *view.size],
            crop_pct=view.crop_pct,
            crop_mode=view.crop_mode,
            interpolation=view.interpolation,
            num_classes=model.num_classes,
            **{key: published[key] for key in ("first_conv", "classifier") if key in published},
        ),
    )
    if classes and model.num_classes:
        config["label_names"] = list(map(str, classes))
    with files.writing(folder) as partial:
        partial.mkdir()
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, partial / "model.safetensors")
        (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def digest(backbone: Backbone) -> str:
    """The SHA-256 of all that the features of a backbone depend on: architecture, weights, mean and std."""
    tensors = backbone.model.state_dict() | dict(mean=backbone.mean, std=backbone.std)
    return digest_of(tensors, json.dumps([type(backbone.model).__name__, backbone.args], default=str))


def digest_of(tensors: dict[str, Tensor], about: str = "") -> str:
    """The SHA-256 of a text and of tensors with their names, in order; the same on every device."""
    found = hashlib.sha256(about.encode())
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
