"""Attention in rows and columns or in windows, against attention of all patches to all: a forward and backward pass of
the same ViT with patches of 16 pixels, at sizes where the number of pairs begins to tell."""

from collections.abc import Callable, Iterator

import torch
from benchmark.turns import Contest

from ssl_vit import backbones, flops
from ssl_vit import recipe as recipes

PATCH, DIM, DEPTH, HEADS = 16, 192, 4, 3
WINDOWS = {224: 7, 512: 8, 1024: 8}  # patches of a side, by the image's side: they must divide it


def contests(device: torch.device) -> Iterator[Contest]:
    images = 8 if device.type == "cuda" else 1
    for side, window in WINDOWS.items():
        passes, counted = {}, {}
        for attn in ("full", "axial", "window"):
            passes[attn], counted[attn] = _pass(attn, side, window, images, device)
        for attn in ("axial", "window"):
            about: dict[str, object] = dict(flops_per_image=dict(ours=counted[attn], full=counted["full"]))
            peers = dict(full=passes["full"])
            yield Contest(f"{attn} attention, {side} px", passes[attn], peers, images, "image", about=about)


def _pass(attn: str, side: int, window: int, images: int, device: torch.device) -> tuple[Callable[[], None], float]:
    """(a forward and backward pass, the FLOPs of an image in it). One block of four attends to all where the others
    attend to their windows."""
    config = recipes.Backbone(
        name="vit_tiny",
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        patch_size=PATCH,
        attn=attn,  # type: ignore[arg-type]
        window_size=window,
    )
    data = recipes.Data(img_size=side, in_chans=3, mean=[0.5] * 3, std=[0.25] * 3)
    backbone = backbones.build(config, data, 0).to(device)
    views = torch.rand(images, 3, side, side, device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            [(_, patches)] = backbone.features(views)
        patches.float().square().mean().backward()
        backbone.zero_grad()

    one = torch.zeros(1, 3, side, side)
    return run, 3 * flops.count(backbone, lambda twin: twin.features(one))
