"""How hard a run's pre-training task is, without any network: the errors of constants and of a linear denoiser.

    python eval/difficulty.py RUN [RUN …]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/difficulty.py runs/mae-digits-s0

The run's objective is built again from RUN/recipe.yaml and corrupts unaugmented training images as it did in training.
Weights do not matter, and test images are not used. Whatever the run's own target, predictions are compared with the
clean, standardised pixels of the patches over which its loss is averaged. So all corruptions are on one scale: the
squared error relative to the variance of these pixels, where 1 is the error of one mean value per channel. There are
three predictions:

    mean patch   the mean of all training patches
    as given     the encoder's input, with the mean patch where a patch is removed
    linear       ridge regression on the 3x3 patches around in the encoder's input, the same for all positions

Up to 5,000 images are used. A fifth of them is scored; another fifth chooses the penalty, and then joins the fit. For
tasks that do not recover a corrupted image, such as dino's, nothing is measured. RUN/difficulty.json holds the result.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.measure import cli, features, results
from eval.page import text_tables
from ssl_vit import data, errors, files, objectives, pretrain, system
from ssl_vit.commands import Parser
from ssl_vit.errors import UserError, say
from ssl_vit.patches import patchify
from ssl_vit.randomness import Draw

IMAGES = 5_000
VALUES = 2**27  # the most input values of the ridge; beyond them, some patches are left out of its fit
PENALTIES = [10.0**k for k in range(-6, 3)]  # relative to the mean square of an input


def evaluate(run: Path) -> dict | None:
    """The errors for a run, also written to its folder; None, with a message, if its task has none."""
    if not (run / "recipe.yaml").exists():
        say(f"{run} was not pre-trained by this code, so it has no task to measure.")
        return None
    recipe = objectives.read_recipe(str(run / "recipe.yaml"), [], None)
    state = cli.processes()
    images = data.load(recipe.data, "train").to(state.device)
    objective = pretrain.build(recipe, images).to(state.device).eval()
    views = pretrain.fit_images(recipe, images, state.device)
    if objective.requires_fit:
        objective.fit(views, recipe.train.seed)
    errors_of_run = measure(objective, views[:: math.ceil(len(views) / IMAGES)], recipe.train.seed)
    if errors_of_run is None:
        say(
            f"{run} has nothing to measure: its objective, {recipe.objective_name}, does not recover a corrupted image."
        )
        return None
    if state.is_main_process:
        about = errors_of_run | results.SURROUNDINGS | dict(measured_at=results.now())
        with results.lock(run):
            files.write(run / "difficulty.json", json.dumps(about, indent=1))
    return errors_of_run


def refuse_missing(run: Path) -> None:
    """Raises UserError unless it is a run, a control, a foreign backbone, or a folder of their rows."""
    if str(run) in features.CONTROLS or str(run) in timm.list_models() + timm.list_models(pretrained=True):
        return
    if not any((run / file).exists() for file in ("recipe.yaml", "results.jsonl", "config.json")):
        others = (str(path) for path in run.parent.glob("*") if path != run)
        raise UserError(f"There is no run {str(run)!r}.{errors.nearest(str(run), others)}")


@torch.no_grad()
def measure(objective: pretrain.Objective, images: Tensor, seed: int) -> dict | None:
    """The errors for an objective on clean images (n, C, H, W) in [0, 1]; None if it recovers no corrupted image."""
    device = images.device
    given = objective.encoder_inputs(images[:1], Draw(seed, 0, torch.arange(1), device))
    if given is None:
        return None
    backbone = objective.backbone
    fifth = torch.arange(len(images)) % 5
    fitting, choosing, scored = (part.nonzero().flatten() for part in (fifth < 3, fifth == 3, fifth == 4))
    training = images[(fifth < 4).to(device)]
    mean = patchify(backbone.normalise(training.mean(0, keepdim=True)), backbone.stride).mean((0, 1))
    values, counted = len(mean), int(given[2].sum())  # the same for every image
    width = 9 * (values + 1) + 1
    fraction = min(1.0, VALUES / (width * counted * len(training)))
    zero = torch.zeros((), dtype=torch.float64)

    def rows(numbers: Tensor, fraction: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs (R, width), clean patches (R, D) minus the mean patch) for a fraction of the patches in the loss of
        these images, float64 on the CPU, some images at a time."""
        for part in numbers.split(64):
            clean, draw = images[part.to(device)], Draw(seed, 0, part, device)
            given = objective.encoder_inputs(clean, draw)
            assert given is not None  # as for the first image
            seen, absent, counted = given
            taken = counted & (draw.uniform("taken", counted.shape[1]) < fraction)
            around = neighbours(patchify(seen, backbone.stride) - mean, ~absent, backbone.grid(images), taken)
            patches = patchify(backbone.normalise(clean), backbone.stride)[taken] - mean
            yield around.cpu().double(), patches.cpu().double()

    def products(numbers: Tensor) -> Tensor:
        return sum((x.T @ torch.cat([x, y], 1) for x, y in rows(numbers, fraction)), zero)

    moments = products(fitting)
    tried = [ridge(moments, penalty) for penalty in PENALTIES]
    wrong = sum((torch.stack([(x @ w - y).square().sum() for w in tried]) for x, y in rows(choosing, fraction)), zero)
    penalty = PENALTIES[int(wrong.argmin())]
    moments += products(choosing)
    weights = ridge(moments, penalty)

    colour = mean.view(-1, images.shape[1]).mean(0).repeat(values // images.shape[1])  # one value per channel
    one_colour, itself = (colour - mean).cpu().double(), slice(4 * (values + 1), 4 * (values + 1) + values)
    errors_of = (
        torch.stack([(guess - y).square().sum() for guess in (one_colour, 0.0, x[:, itself], x @ weights)])
        for x, y in rows(scored)
    )
    variance, mean_patch, identity, linear = sum(errors_of, zero).tolist()
    return dict(
        mean_patch=mean_patch / variance,
        identity=identity / variance,
        linear=linear / variance,
        penalty=penalty,
        images=len(images),
        patches=counted * len(scored),
        fitted_patches=int(moments[width - 1, width - 1]),
    )


def neighbours(patches: Tensor, visible: Tensor, grid: tuple[int, int], taken: Tensor) -> Tensor:
    """The ridge's inputs (R, 9·(D + 1) + 1): for each taken patch, the 3x3 patches around it, row by row, and a 1.

    Each of the nine is its values and whether it is visible, all 0 if it is not visible or is outside the image.
    patches: (B, N, D) minus the mean patch; visible, taken: bool (B, N).
    """
    both = torch.cat([patches, torch.ones_like(patches[..., :1])], -1) * visible[..., None]
    padded = F.pad(both.unflatten(1, grid), (0, 0, 1, 1, 1, 1))
    height, width = grid
    shifted = [padded[:, i : i + height, j : j + width].flatten(1, 2)[taken] for i in range(3) for j in range(3)]
    return torch.cat([*shifted, torch.ones_like(shifted[0][:, :1])], 1)


def ridge(moments: Tensor, penalty: float) -> Tensor:
    """Weights (p, D) of ridge regression, from XᵀX and XᵀY side by side, (p, p + D); the last input is the bias, which
    is not penalised."""
    gram, cross = moments[:, : len(moments)], moments[:, len(moments) :]
    added = penalty * gram.diagonal()[:-1].mean() * torch.ones(len(gram)).double()
    added[-1] = 0
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram + added.diag()))


def table(rows: dict[str, dict]) -> str:
    """The errors by run, relative to the variance of the clean pixels, as Markdown."""
    lines = [["run", "mean patch", "as given", "linear", "penalty", "images"]]
    for name, row in rows.items():
        errors_of = [f"{row[key]:.3f}" for key in ("mean_patch", "identity", "linear")]
        lines.append([name, *errors_of, f"{row['penalty']:g}", f"{row['images']:,}"])
    return text_tables.aligned(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--threads", type=cli.positive, help="CPU threads; default: cores")
    args = parser.parse_args()
    for run in args.runs:
        refuse_missing(run)
    system.prepare(args.threads or "auto")
    rows = {run.name: measured for run in args.runs if (measured := evaluate(run)) is not None}
    if rows:
        say(f"\nSquared error, relative to the variance of the clean pixels\n\n{table(rows)}")


if __name__ == "__main__":
    errors.run(main)
