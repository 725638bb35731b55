"""Segmentation from frozen patch features: mean intersection over union (mIoU) of two probes.

    python eval/segmentation.py --data PATH --backbone RUN [RUN|WEIGHTS|pixels …] [--img-size H W] [--labels 10% all]

On a laptop, on digits whose strokes are the masks, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/segmentation.py --backbone runs/mae-digits-s0 pixels

PATH is a parquet file or folder with the columns image and mask, or a folder with masks/ beside images/. A mask holds
the class of each pixel; classes.txt beside them may name the classes. --data digits is the default for runs on digits.
The linear probe is fitted on the patches of the training images, its penalty chosen on a tenth of them; the k-NN probe
looks the patches up among theirs (k = 20). Both predict scores for each patch, resized to the mask's own size.
Whole images are shown at the backbone's size, whatever their shape, or at --img-size: runs that were trained on small
images see photographs so, with their positions resampled. --labels 10% uses the masks of a tenth of the images.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ssl_vit.own_eval  # noqa: F401  or another package called eval is imported
from eval.compare import iou
from eval.measure import cli, dense, dense_sets, features, results
from eval.page import mask_pictures, text_tables
from ssl_vit import errors, pictures, subsets
from ssl_vit.data import ImageSet
from ssl_vit.errors import say
from ssl_vit.views import Evaluation


def evaluate(source: features.Source, request: dense_sets.Request) -> list[dict]:
    """The rows of one backbone, written to its folder. Only the first process returns rows."""
    train_images, test_images = request.images(source)
    view = dense_sets.view_of(source, train_images)
    extracted = [
        features.extract(source, images, request.state, vectors=patch_vectors, view=view)
        for images in (train_images, test_images)
    ]
    if not request.state.is_main_process:
        return []
    zero = torch.zeros(1, train_images.channels, *view.size)
    grid = grid_of(source, zero)
    train, test = (
        dense.Patches(np.asarray(found.poolings(-1)["patches"]).reshape(len(images), *grid, -1), masks, request.classes)
        for found, images, masks in zip(extracted, (train_images, test_images), request.masks, strict=True)
    )
    common = row(source, request, test_images, view, grid)
    rows, counts = [], []
    shown = pictures.spread(len(test), None, mask_pictures.SHOWN).numpy()
    drawn = [[request.masks[1][i] for i in shown]]
    for part, seed in request.parts:
        chosen = request.with_masks(part, seed)
        own = train.part(chosen)
        images = len(own) + len(test)
        labels = dict(label_fraction=cli.describe_part(part), subset_seed=seed, train_n=len(own))
        cost = dict(eval_images=images, eval_flops=images * extracted[0].flops_per_image)
        for protocol, fit in PROBES.items():
            started = time.perf_counter()
            scores, about = fit(own)
            found = dense.confusions(test, scores)
            figures = dict(
                protocol=request.sized(protocol),
                miou=dense.miou(found),
                pixel_accuracy=float(np.trace(found.sum(0)) / found.sum()),
                iou=[None if np.isnan(v) else round(float(v), 6) for v in dense.ious(found.sum(0))],
                seconds=round(time.perf_counter() - started, 3),
            )
            rows.append(common | labels | cost | about | figures)
            counts.append(found)
            if (part, seed) == request.most:
                predicted = scores(test.features[shown])
                drawn.append([dense.segment(s, m.shape) for s, m in zip(predicted, drawn[0], strict=True)])
    results.store(source.folder, rows, [dict(confusion=found) for found in counts], test_images)
    words = ["image", "mask (black does not count)", "linear probe", f"k-NN (k={dense.K})"]
    mask_pictures.save(source, test_images, view, shown, drawn, words, "segmentation")
    return rows


def linear(train: dense.Patches) -> tuple[dense.Scores, dict]:
    """The linear probe, with the penalty that is best on a tenth of the training images."""
    fit, rest = (train.part(chosen) for chosen in subsets.hold_out(np.zeros(len(train), dtype=int), 0))
    tried = {}
    for penalty in dense.PENALTIES:
        tried[penalty] = dense.miou(dense.confusions(rest, dense.linear(fit, penalty)))
    best = max(tried, key=lambda penalty: tried[penalty])
    said = {f"{penalty:g}": round(found, 6) for penalty, found in tried.items()}
    return dense.linear(train, best), dict(settings=dict(penalty=best, tried=said))


def nearest(train: dense.Patches) -> tuple[dense.Scores, dict]:
    """k-NN among patches."""
    return dense.nearest(train), dict(settings=dict(k=dense.K, temperature=dense.TEMPERATURE, bank=dense.BANK))


PROBES = {"segmentation-linear": linear, f"segmentation-knn-k{dense.K}": nearest}


# -- features ---------------------------------------------------------------------------------------------------------


def patch_vectors(source: features.Source, view: Tensor, blocks: list[int]) -> dict[tuple[int, str], Tensor]:
    """The patch features of the last block, one after another, (B, H·W·D). Raw pixels: the pixels of each patch."""
    if source.backbone is None:
        side = dense_sets.side(view)
        cut = view.unfold(2, side, side).unfold(3, side, side)  # (B, C, H, W, side, side)
        return {(0, "patches"): cut.permute(0, 2, 3, 1, 4, 5).flatten(1)}
    [(_, patches)] = source.features(view, blocks)
    return {(blocks[0], "patches"): patches.flatten(1)}


@torch.no_grad()
def grid_of(source: features.Source, view: Tensor) -> tuple[int, int]:
    """The patches of an image of this view (1, C, H, W), as (H, W)."""
    if source.backbone is None:
        return view.shape[2] // dense_sets.side(view), view.shape[3] // dense_sets.side(view)
    [(_, patches)] = source.features(view.to(next(source.backbone.parameters()).device))
    return patches.shape[1], patches.shape[2]


# -- rows -------------------------------------------------------------------------------------------------------------


def row(
    source: features.Source, request: dense_sets.Request, test: ImageSet, view: Evaluation, grid: tuple[int, int]
) -> dict:
    """The keys that all rows of a backbone share."""
    return cli.row_of(source, test, "mIoU", request.classes) | dict(
        pooling="patches",
        class_names=request.names,
        view=list(view.size),
        grid=list(grid),
    )


def table(rows: list[dict], folders: dict[str, Path]) -> str:
    """mIoU with its interval over the test images, by backbone and probe, as Markdown."""
    titles = dict(zip(PROBES, ("linear", f"k-NN (k={dense.K})"), strict=True))
    found = []
    for row in rows:
        [title] = [words for probe, words in titles.items() if row["protocol"].startswith(probe)]
        values = iou.of_images(folders[row["run"]] / row["predictions"])
        found.append(((results.run_of(row), f"{row['train_n']:,}"), title, values))
    return text_tables.accuracies(["backbone", "masks"], list(titles.values()), found)


def main() -> None:
    parser = cli.parser(__doc__)
    dense_sets.add_arguments(parser)
    args = parser.parse_args()
    request = dense_sets.Request(args)
    rows = [row for source in request.sources for row in evaluate(source, request)]
    if rows:
        test = rows[0]
        say(
            f"\n{test['eval_data']} ({test['split']}, n = {test['n']:,}): mean intersection over union (mIoU) of "
            f"{test['classes']} classes in %, ± the 95 % interval over test images.\n"
        )
        say(table(rows, request.folders))


if __name__ == "__main__":
    errors.run(main)
