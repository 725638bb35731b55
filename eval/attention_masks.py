"""The class token's attention as masks of objects: the Jaccard index, without training anything.

    python eval/attention_masks.py --data PATH --backbone RUN [RUN|WEIGHTS …] [--img-size H W]

On a laptop, on digits whose strokes are the masks, after `python ssl_vit/pretrain.py --recipe dino`, and again with
`train.steps=0 --output runs/random`:

    python eval/attention_masks.py --backbone runs/dino-digits-s0 runs/random

PATH and its masks are as in eval/segmentation.py. Each head of the last block gives a mask, the patches that hold 60 %
of its attention. For each class that an image shows, but for "background", the best head counts; the mean over these
classes is the image's Jaccard index (after section 4.2.2 of the DINO paper). Only test images are used.
"""

import time

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np
import torch

from eval.measure import attention_masks, cli, dense, dense_sets, features, mask_pictures, results
from eval.page import text_tables
from ssl_vit import errors, flops, pictures
from ssl_vit.backbones import EvaBackbone, TokenBackbone
from ssl_vit.data import evaluation_views
from ssl_vit.errors import UserError, say

PROTOCOL = "attention-masks"


@torch.inference_mode()
def evaluate(source: features.Source, request: dense_sets.Request) -> list[dict]:
    """The row of one backbone, written to its folder. Only the first process returns one."""
    backbone = source.backbone
    if not isinstance(backbone, TokenBackbone) or not backbone.has_class_token:
        raise UserError(f"{source.name} has no class token, whose attention would be the masks: leave it out.")
    if isinstance(backbone, EvaBackbone):
        raise UserError(f"{source.name} has rotary positions, and its attention cannot be read here: leave it out.")
    _, test = request.images(source)
    if not request.state.is_main_process:
        return []
    started = time.perf_counter()
    _, masks = request.masks
    backbone.to(request.state.device)
    view = dense_sets.view_of(source, test)
    compute = features.Piecewise(lambda part: attention_masks.keep(backbone.attention(part)).cpu().numpy())
    batches = evaluation_views(test, view, request.state.device)
    kept = np.concatenate([found for batch in batches for found in compute(batch)])  # (n, heads, H, W)
    found = [attention_masks.overlaps(k, m, request.classes) for k, m in zip(kept, masks, strict=True)]
    objects = [k for k, name in enumerate(request.names) if name.strip().lower() != attention_masks.BACKGROUND]
    values = np.array([attention_masks.jaccard(each, objects) for each in found])
    if np.isnan(values).any():
        first = int(np.flatnonzero(np.isnan(values))[0])
        raise UserError(
            f"The mask of test image {first} of {test.name} shows no class that counts: leave the image out."
        )
    pixels = np.stack([np.bincount(m[m < request.classes], minlength=request.classes) for m in masks])
    zero = torch.zeros(1, test.channels, *view.size)
    row = cli.row_of(source, test, "Jaccard", request.classes) | dict(
        protocol=request.named(PROTOCOL),
        pooling="attention",
        label_fraction=0.0,
        subset_seed=None,
        train_n=0,
        value=float(values.mean()),
        class_names=request.names,
        jaccard=_by_class(found),
        settings=dict(mass=attention_masks.MASS, heads=kept.shape[1]),
        view=list(view.size),
        grid=list(kept.shape[2:]),
        eval_images=len(test),
        eval_flops=len(test) * flops.count(backbone, lambda twin: twin.attention(zero)),
        seconds=round(time.perf_counter() - started, 3),
    )
    results.store(source.folder, [row], [dict(jaccard=values.astype(np.float32), pixels=pixels)], test)
    _draw(source, request, kept, found, objects)
    return [row]


def _by_class(found: list[np.ndarray]) -> list[float | None]:
    """The Jaccard index of each class: the mean over the images that show it, of the best head in each."""
    best = np.stack([each.max(0) for each in found])
    return [None if np.isnan(b).all() else round(float(np.nanmean(b)), 6) for b in best.T]


def _draw(
    source: features.Source, request: dense_sets.Request, kept: np.ndarray, found: list[np.ndarray], objects: list[int]
) -> None:
    """SOURCE/pictures/DATA-masks.png: images, their masks, and the head that fits one of their classes best."""
    _, test = request.images(source)
    shown = pictures.spread(len(test), None, mask_pictures.SHOWN).numpy()
    truth, best = [request.masks[1][i] for i in shown], []
    for i, mask in zip(shown, truth, strict=True):
        only = np.full(found[i].shape, -1.0)
        only[:, objects] = np.nan_to_num(found[i][:, objects], nan=-1.0)
        head, fitted = np.unravel_index(only.argmax(), only.shape)
        attended = attention_masks.enlarged(kept[i][head : head + 1], mask.shape)[0]
        best.append(np.where(attended, fitted, dense.IGNORED).astype(np.uint8))
    words = ["image", "mask (black does not count)", "what one head attends to, in the colour of a class"]
    mask_pictures.save(source, test, dense_sets.view_of(source, test), shown, [truth, best], words, "masks")


def main() -> None:
    parser = cli.parser(__doc__, labels=False, frozen=False, pixels=False)  # it computes in float32
    dense_sets.add_arguments(parser)
    request = dense_sets.Request(parser.parse_args())
    rows = [row for source in request.sources for row in evaluate(source, request)]
    if rows:
        test = rows[0]
        say(
            f"\n{test['eval_data']} ({test['split']}, n = {test['n']:,}): Jaccard index of the attention's masks in %, "
            "± the 95 % interval over test images.\n"
        )
        say(
            text_tables.accuracies(
                ["backbone", "heads"],
                ["Jaccard"],
                [
                    (
                        (results.run_of(row), str(row["settings"]["heads"])),
                        "Jaccard",
                        None,
                        np.load(request.folders[row["run"]] / row["predictions"])["jaccard"],
                    )
                    for row in rows
                ],
            )
        )


if __name__ == "__main__":
    errors.run(main)
