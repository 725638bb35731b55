"""A backbone as a graph that runs without this project: ONNX, or torch.export.

Images go in as float32 (B, C, H, W) in [0, 1], B free; the graph standardises them itself. Out come `pooled` (B, D),
the class token or without one the mean of the patches, `patches` (B, h, w, D), and of a classifier `logits` (B, K).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.backbones import Backbone
from ssl_vit.errors import UserError

MISSING = "{} needs the packages {}: pip install 'ssl_vit[export]'."
CLOSE = 1e-4  # relative to the largest value: float32 through other kernels


class Graph(nn.Module):
    """What is exported."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.names = ["pooled", "patches", "logits"] if backbone.model.num_classes else ["pooled", "patches"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model = self.backbone.model
        tokens = model.forward_features(self.backbone.normalise(images))
        prefix, patches = self.backbone.split_tokens(tokens, images)
        has_class = self.backbone.has_class_token and prefix.shape[1]
        pooled = prefix[:, 0] if has_class else patches.flatten(1, 2).mean(1)
        return pooled, patches, *([model.forward_head(tokens)] if model.num_classes else [])


def about(backbone: Backbone, classes: list[str] | None) -> dict[str, str]:
    """What goes into a graph's file beside the weights."""
    view = backbone.evaluation_view
    return dict(
        classes=json.dumps(classes or [], ensure_ascii=False),
        img_size=json.dumps(list(view.size)),
        crop_pct=str(view.crop_pct),
        crop_mode=view.crop_mode,
        interpolation=view.interpolation,
        input="float32 (B, C, H, W) in [0, 1]; the graph standardises it",
    )


def to_torch(backbone: Backbone, file: Path, classes: list[str] | None) -> None:
    """Write a program of torch.export, which torch.export.load reads. Raises UserError if the model has none."""
    graph, images = Graph(backbone).eval(), _images(backbone)
    try:
        with torch.no_grad():
            program = torch.export.export(graph, (images,), dynamic_shapes=_free(), strict=False)
        torch.export.save(program, file, extra_files=dict(about=json.dumps(about(backbone, classes))))
    except Exception as error:  # torch.export has a dozen types for what it cannot trace
        raise UserError(_cannot(backbone, "torch.export", error, "timm")) from None
    others = _images(backbone, 3)
    _same(graph, others, torch.export.load(file).module()(others), "torch.export")


def to_onnx(backbone: Backbone, file: Path, classes: list[str] | None) -> None:
    """Write an ONNX model, whose metadata hold `about`. Raises UserError if packages or operators are missing."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx translates with
    except ImportError as error:
        raise UserError(MISSING.format("--to onnx", "onnx, onnxscript and onnxruntime")) from error
    graph, images = Graph(backbone).eval(), _images(backbone)
    try:
        with torch.no_grad():
            made = torch.onnx.export(
                graph,
                (images,),
                input_names=["images"],
                output_names=graph.names,
                dynamic_shapes=_free(),
                dynamo=True,
                verbose=False,
            )
        assert made is not None
        model = made.model_proto
        for key, value in about(backbone, classes).items():
            model.metadata_props.add(key=key, value=value)
        onnx.save(model, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # torch, onnxscript and onnxruntime each have their own for an operator that is missing
        raise UserError(_cannot(backbone, "ONNX", error, "torch")) from None
    others = _images(backbone, 3)
    try:
        found = session.run(None, {"images": others.numpy()})
    except Exception as error:  # onnxruntime's own, where the graph holds the batch that it was traced with
        raise UserError(_cannot(backbone, "ONNX", error, "torch")) from None
    _same(graph, others, [torch.from_numpy(value) for value in found], "ONNX")


def _images(backbone: Backbone, count: int = 2) -> Tensor:
    """Images to trace with, and others to compare on: were the batch a constant, it would show."""
    shape = (count, len(backbone.mean), *backbone.input_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _free() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("batch", min=1, max=2**16)}}


def _cannot(backbone: Backbone, what: str, error: Exception, instead: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "perator" in line or "nsupported" in line), lines[0] if lines else "")
    name = backbone.model.pretrained_cfg.get("architecture", type(backbone.model).__name__)
    return f"{name} cannot be written as {what} ({reason[:200] or type(error).__name__}): use --to {instead}."


@torch.no_grad()
def _same(graph: Graph, images: Tensor, found: Any, what: str) -> None:
    """Raises UserError if what was written does not give the outputs of the model."""
    for name, ours, theirs in zip(graph.names, graph(images), found, strict=True):
        off = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-12))
        if not off < CLOSE:
            raise UserError(
                f"As {what} the model gives other {name} (off by {off:.1g} of the largest): update torch and "
                "onnxruntime, or use --to timm."
            )
