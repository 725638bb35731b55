"""Segmentation: mean intersection over union (mIoU) of two probes of frozen patch features, and by fine-tuning.

    python eval/segmentation.py --data PATH --backbone RUN [RUN|WEIGHTS|pixels …] [--img-size H W] [--labels 10% all]
        [--finetune [--steps N] [--lr 1e-3 …]]

On a laptop, on digits whose strokes are the masks, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/segmentation.py --backbone runs/mae-digits-s0 pixels

PATH is a parquet file or folder with the columns image and mask, or a folder with masks/ beside images/. A mask holds
the class of each pixel; classes.txt beside them may name the classes. --data digits is the default for runs on digits.
The linear probe is fitted on the patches of the training images, its penalty chosen on a tenth of them; the k-NN probe
looks the patches up among theirs (k = 20). Both predict scores for each patch, resized to the mask's own size. Whole
images are shown at the backbone's size, whatever their shape, or at --img-size: runs trained on small images can thus
see photographs, with positions resampled. --labels 10% uses the masks of a tenth of the images. --finetune adds a
column: the backbone and a small convolutional decoder, trained together on random crops and flips of the images with
masks; of several --lr, the one that is best on a held-out tenth of them. With a randomly initialised backbone this is
training from scratch. Its states are in RUN/segmentation/: the same command continues where it was stopped.
"""

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np
import torch
from torch import Tensor

from eval.compare import iou
from eval.measure import cli, dense, dense_sets, dense_tuning, features, mask_pictures, results
from eval.page import text_tables
from ssl_vit import errors, pictures, subsets
from ssl_vit.data import ImageSet
from ssl_vit.errors import say
from ssl_vit.views import Evaluation


def evaluate(
    source: features.Source, request: dense_sets.Request, schedule: dense_tuning.Schedule | None = None
) -> list[dict]:
    """The rows of one backbone, written to its folder. Only the first process returns rows. schedule: of fine-tuning;
    raw pixels have no weights for it."""
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
    words, drawn = ["image", "mask (black does not count)"], [[request.masks[1][i] for i in shown]]
    for part, seed in request.parts:
        chosen = request.with_masks(part, seed)
        own = train if part is None else train.part(chosen)
        images = len(own) + len(test)
        labels = dict(label_fraction=cli.describe_part(part), subset_seed=seed, train_n=len(own))
        cost = dict(eval_images=images, eval_flops=images * extracted[0].flops_per_image)
        for protocol, (title, fit) in PROBES.items():
            started = time.perf_counter()
            scores, about = fit(own)
            counts.append(dense.confusions(test, scores))
            rows.append(common | labels | cost | about | measured(request.named(protocol), counts[-1], started))
            if (part, seed) == request.most:
                words.append(title)
                drawn.append(segmented(scores(test.features[shown]), drawn[0]))
        if schedule and source.backbone is not None:
            started = time.perf_counter()
            images_left = train_images.part(torch.from_numpy(chosen))
            states = source.folder / "segmentation"
            task = dense_tuning.Task(
                source, images_left, own.masks, request.classes, view, seed_of(source, seed), states
            )
            tuned = dense_tuning.fine_tune(task, schedule)
            judged = dataclasses.replace(task, images=test_images, masks=test.masks)
            counts.append(tuned.confusions(judged))
            cost = dict(
                eval_images=tuned.cost.images + len(test),
                eval_flops=tuned.cost.flops + len(test) * tuned.flops_per_image(judged),
            )
            found = measured(request.named(schedule.protocol), counts[-1], started - tuned.cost.seconds)
            rows.append(common | labels | cost | tuned.about | found)
            if (part, seed) == request.most:
                words.append(TUNED)
                drawn.append(segmented(tuned.scores(test_images, view, shown), drawn[0]))
    results.store(source.folder, rows, [dict(confusion=found) for found in counts], test_images)
    mask_pictures.save(source, test_images, view, shown, drawn, words, "segmentation")
    return rows


def seed_of(source: features.Source, labels: int | None) -> int:
    """The seed of a fine-tuning: that of the pre-training, or for foreign weights that of the images with masks."""
    seed: int = source.settings["train"]["seed"] if source.settings else labels or 0
    return seed


def measured(protocol: str, found: np.ndarray, started: float) -> dict:
    """The keys of a row with the figures of confusion counts (n, K, K)."""
    return dict(
        protocol=protocol,
        miou=dense.miou(found),
        pixel_accuracy=float(np.trace(found.sum(0)) / found.sum()),
        iou=[None if np.isnan(v) else round(float(v), 6) for v in dense.ious(found.sum(0))],
        seconds=round(time.perf_counter() - started, 3),
    )


def segmented(scores: Iterable[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    """The predicted masks of images with these scores, of the true ones' sizes."""
    return [dense.segment(each, mask.shape) for each, mask in zip(scores, masks, strict=True)]


def linear(train: dense.Patches) -> tuple[dense.Scores, dict]:
    """The linear probe, with the penalty that is best on a tenth of the training images."""
    fit, rest = (train.part(chosen) for chosen in subsets.hold_out(np.zeros(len(train), dtype=int), 0))
    tried = {}
    for penalty in dense.PENALTIES:
        tried[penalty] = dense.miou(dense.confusions(rest, dense.linear(fit, penalty)))
    del fit, rest  # of large sets they may fill the memory
    best = max(tried, key=lambda penalty: tried[penalty])
    said = {f"{penalty:g}": round(found, 6) for penalty, found in tried.items()}
    return dense.linear(train, best), dict(settings=dict(penalty=best, tried=said))


def nearest(train: dense.Patches) -> tuple[dense.Scores, dict]:
    """k-NN among patches."""
    return dense.nearest(train), dict(settings=dict(k=dense.K, temperature=dense.TEMPERATURE, bank=dense.BANK))


PROBES = {
    "segmentation-linear": ("linear probe", linear),
    f"segmentation-knn-k{dense.K}": (f"k-NN (k={dense.K})", nearest),
}
TUNED = "fine-tuned"


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
    titles = {protocol: title for protocol, (title, _) in PROBES.items()} | {dense_tuning.PROTOCOL: TUNED}
    found = []
    for row in rows:
        [title] = [words for protocol, words in titles.items() if row["protocol"].startswith(protocol)]
        values = iou.of_images(folders[row["run"]] / row["predictions"])
        found.append(((results.run_of(row), f"{row['train_n']:,}"), title, row["subset_seed"], values))
    columns = [title for title in titles.values() if any(title == column for _, column, _, _ in found)]
    return text_tables.accuracies(["backbone", "masks"], columns, found)


def main() -> None:
    parser = cli.parser(__doc__)
    dense_sets.add_arguments(parser)
    dense_tuning.add_arguments(parser)
    args = parser.parse_args()
    schedule = dense_tuning.schedule_of(args)
    request = dense_sets.Request(args)
    for part, seed in request.parts:  # too few are refused before features are computed
        request.with_masks(part, seed)
    rows = [row for source in request.sources for row in evaluate(source, request, schedule)]
    if rows:
        test = rows[0]
        say(
            f"\n{test['eval_data']} ({test['split']}, n = {test['n']:,}): mean intersection over union (mIoU) of "
            f"{test['classes']} classes in %, ± the 95 % interval over test images and draws of labels.\n"
        )
        say(table(rows, request.folders))


if __name__ == "__main__":
    errors.run(main)
