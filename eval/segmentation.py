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

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

import ssl_vit.own_eval  # noqa: F401  or another package called eval is imported
from eval.compare import iou
from eval.measure import cli, dense, dense_sets, features, results
from eval.page import text_tables
from ssl_vit import errors, pictures, subsets
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.errors import UserError, say
from ssl_vit.recipe import short
from ssl_vit.views import Evaluation

SHOWN = 6  # images in the picture
SIDES = (8, 4, 2)  # in pixels, of the patches of raw pixels


def evaluate(source: features.Source, request: "Request") -> list[dict]:
    """The rows of one backbone, written to its folder. Only the first process returns rows."""
    train_images, test_images = request.images(source)
    view = view_of(source, train_images)
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
    shown = pictures.spread(len(test), None, SHOWN).numpy()
    drawn: list[np.ndarray] = [request.masks[1][i] for i in shown]
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
                drawn += [
                    dense.segment(each, request.masks[1][i].shape) for each, i in zip(predicted, shown, strict=True)
                ]
    results.store(source.folder, rows, [dict(confusion=found) for found in counts], test_images)
    draw(source, request, test_images, shown, drawn)
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


# -- images and features ----------------------------------------------------------------------------------------------


class Request(cli.EvalRequest):
    """The backbones, images and masks. masks: of the training and test images, uint8 (h, w) each; names: of classes."""

    def __init__(self, args: argparse.Namespace):
        self.img_size = args.img_size = tuple(args.img_size) if args.img_size else None
        super().__init__(args)
        for part, _ in self.parts:
            if part is not None and part >= 1:
                raise UserError(
                    f"An image shows several classes, so there are no {int(part)} per class: give --labels a fraction, "
                    "such as 10%, or all."
                )
        self.most = max(self.parts, key=lambda found: (found[0] is None, found[0]))
        self._sets: dict[int | None, tuple[ImageSet, ImageSet]] = {}
        found = self.images(self.sources[0])
        self.masks, self.names, self.classes = dense_sets.masks_of(self.config.name, *found, args.ignore)

    def with_masks(self, part: float | None, seed: int | None) -> np.ndarray:
        """The training images whose masks are used, as indices; the subsets of one seed are nested."""
        everything = np.zeros(len(self.masks[0]), dtype=int)
        return np.arange(len(everything)) if part is None else subsets.stratified(everything, part, seed or 0)

    def sized(self, protocol: str) -> str:
        """The protocol's name, with --img-size if it is given."""
        return protocol if self.img_size is None else f"{protocol}-{self.img_size[0]}x{self.img_size[1]}"

    def images(self, source: features.Source) -> tuple[ImageSet, ImageSet]:
        """(training images, images to evaluate on), with as many channels as the backbone takes; labels are not used.

        Raises UserError for a run that was trained on permuted pixels, whose masks would have to be permuted too.
        """
        channels = self.config.in_chans if source.backbone is None else len(source.backbone.mean)
        if channels not in self._sets:
            self._sets[channels] = dense_sets.load(self.config, channels, source)
        train, test = self._sets[channels]
        return train.to(self.state.device), test.to(self.state.device)


def view_of(source: features.Source, images: ImageSet) -> Evaluation:
    """The whole image, squashed to the backbone's size; for raw pixels that of the backbones beside them or --img-size,
    and of photographs in whole patches."""
    own = features.view_of(source, images)
    height, width = source.size or own.size
    if source.backbone is None and max(height, width) > 64:
        height, width = (-(-side // SIDES[0]) * SIDES[0] for side in (height, width))
    return Evaluation((height, width), 1.0, own.interpolation, "squash")


def patch_vectors(source: features.Source, view: Tensor, blocks: list[int]) -> dict[tuple[int, str], Tensor]:
    """The patch features of the last block, one after another, (B, H·W·D). Raw pixels: the pixels of each patch."""
    if source.backbone is None:
        side = _side(view)
        cut = view.unfold(2, side, side).unfold(3, side, side)  # (B, C, H, W, side, side)
        return {(0, "patches"): cut.permute(0, 2, 3, 1, 4, 5).flatten(1)}
    [(_, patches)] = source.backbone.features(view, blocks)
    return {(blocks[0], "patches"): patches.flatten(1)}


@torch.no_grad()
def grid_of(source: features.Source, view: Tensor) -> tuple[int, int]:
    """The patches of an image of this view (1, C, H, W), as (H, W)."""
    if source.backbone is None:
        return view.shape[2] // _side(view), view.shape[3] // _side(view)
    [(_, patches)] = source.backbone.features(view.to(next(source.backbone.parameters()).device))
    return patches.shape[1], patches.shape[2]


def _side(view: Tensor) -> int:
    """Of a patch of raw pixels: the largest in SIDES that divides both sides of the image and leaves eight patches or
    more along each; else 1."""
    height, width = view.shape[2:]
    return next((s for s in SIDES if height % s == width % s == 0 and min(height, width) >= 8 * s), 1)


# -- rows and pictures ------------------------------------------------------------------------------------------------


def row(source: features.Source, request: Request, test: ImageSet, view: Evaluation, grid: tuple[int, int]) -> dict:
    """The keys that all rows of a backbone share."""
    return cli.row_of(source, test, "mIoU", request.classes) | dict(
        pooling="patches",
        class_names=request.names,
        view=list(view.size),
        grid=list(grid),
    )


def draw(source: features.Source, request: Request, test: ImageSet, shown: np.ndarray, drawn: list[np.ndarray]) -> None:
    """SOURCE/pictures/DATA-segmentation.png: images, their masks, and what each probe predicts.

    drawn: the masks of these images, then the predictions of one probe after another.
    """
    view = view_of(source, test)
    [images] = evaluation_views(test, view, torch.device("cpu"), torch.from_numpy(shown))
    panels = [images[:, :3] if test.channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)]
    for start in range(0, len(drawn), len(shown)):
        masks = [torch.from_numpy(coloured(mask)).permute(2, 0, 1) for mask in drawn[start : start + len(shown)]]
        panels.append(torch.stack([interpolate(mask[None], view.size, mode="nearest")[0] for mask in masks]))
    words = ["image", "mask (black does not count)", "linear probe", f"k-NN (k={dense.K})"]
    title = f"{test.name}, {test.split}: images {', '.join(map(str, shown.tolist()))}"
    sheet = pictures.Sheet(torch.stack(panels, 1), words)
    pictures.save(sheet, source.folder / "pictures" / f"{short(test.name)}-segmentation.png", title)


def coloured(mask: np.ndarray) -> np.ndarray:
    """A mask (h, w) as RGB (h, w, 3) in [0, 1]: a colour of its own for each class, black where pixels do not count."""
    hue = (mask * 0.618034) % 1.0  # golden ratio: neighbouring numbers get hues far apart
    light = 0.45 + 0.2 * (mask % 3)
    wheel = np.clip(np.abs((hue[..., None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    shown = light[..., None] + (wheel - 0.5) * 0.7
    return np.where((mask == dense.IGNORED)[..., None], 0.0, np.clip(shown, 0, 1)).astype(np.float32)


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
    parser.add_argument(
        "--img-size", type=cli.positive, nargs=2, metavar=("H", "W"), help="show images at this size, in whole patches"
    )
    parser.add_argument(
        "--ignore", type=cli.natural, nargs="+", default=[], metavar="CLASS", help="classes whose pixels do not count"
    )
    args = parser.parse_args()
    request = Request(args)
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
