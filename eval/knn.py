"""k-NN accuracy of frozen features, compared with the controls.

    python eval/knn.py --backbone RUN [RUN|WEIGHTS|pixels|pixels-pca64 …] [--data NAME|PATH|owner/name]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/knn.py --backbone runs/mae-digits-s0 pixels

The neighbours are training images, and the queries are the images of the report split. Primary protocol: features
centred by the training mean and L2-normalised, k = 20, weights exp(similarity / 0.07). DINO's protocol is the same
without centring.
`accelerate launch` computes the features on all its processes.
"""

import time
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np

from eval.measure import cli, features, pictures, results
from eval.measure.predictions import Predictions
from eval.page import text_tables
from ssl_vit import errors, neighbours
from ssl_vit.errors import UserError, say
from ssl_vit.settings import known

KS = (1, 5, 10, 20, 100, 200)
PRIMARY = 20


def evaluate(source: features.Source, request: cli.EvalRequest, ks: list[int] | None) -> list[dict]:
    """The rows of one backbone, written to its folder: for each label subset, pooling, centring and k.

    ks: by default, all of KS up to the number of training images. Only the first process returns rows.
    """
    train, test, parts = request.labelled_images(source)
    bank, queries = features.extract_both(source, train, test, request.state)
    if not request.state.is_main_process:
        return []
    labels, truth = cli.labels_of(train), cli.labels_of(test)
    common, classes = cli.row(source, test), len(known(train.classes))
    rows = []
    for part, chosen in parts:
        started = time.perf_counter()
        found, predictions = [], []
        images = len(chosen) + len(test)
        for pooling, vectors in bank.poolings(-1).items():
            pair = vectors[chosen], queries.poolings(-1)[pooling]
            for protocol, centre in (("knn", True), ("knn-uncentred", False)):
                near, far = neighbours.prepare(*pair, centre=centre)
                search = 2 * near.shape[1] * len(near) * len(far)  # all similarities; the vote costs next to nothing
                cost = dict(eval_images=images, eval_flops=bank.flops_per_image * images + search)
                for k, answer in vote(near, labels[chosen], far, truth, choose(ks, len(chosen)), classes):
                    name = dict(protocol=f"{protocol}-k{k}", pooling=pooling)
                    found.append(common | part | name | answer.metrics(truth) | cost)
                    predictions.append(answer)
        for row in found:
            row["seconds"] = round(time.perf_counter() - started, 3)
        results.write(source.folder, found, predictions, truth, test)
        rows += found
    if source.backbone is not None:
        pictures.write(source, train, test, bank, queries)
    return rows


def choose(ks: list[int] | None, count: int) -> list[int]:
    """The values of k for `count` training images. Raises UserError if one of `ks` is not between 1 and `count`."""
    for k in ks or ():
        if not 1 <= k <= count:
            raise UserError(f"--k must be between 1 and {count}, the number of training images, not {k}.")
    return sorted({k for k in (*(ks or KS), PRIMARY) if k <= count})


def vote(
    near: np.ndarray, labels: np.ndarray, far: np.ndarray, truth: np.ndarray, ks: list[int], classes: int
) -> list[tuple[int, Predictions]]:
    """(k, predictions for the queries far (m, D), whose classes are truth (m,)) for each k.

    near (n, D), labels (n,): the training images. The probability of a class is its fraction of the vote.
    """
    parts: dict[int, list[Predictions]] = {k: [] for k in ks}
    at = 0
    for found in neighbours.weights(near, labels, far, ks, classes):
        for k, weights in found.items():
            parts[k].append(Predictions.of([weights], truth[at : at + len(weights)]))
        at += len(weights)
    return [(k, Predictions.join(batches)) for k, batches in parts.items()]


def table(rows: list[dict], folders: dict[str, Path]) -> str:
    """Primary and uncentred accuracy by backbone, labels and pooling, as Markdown. folders: of the runs, by name."""
    titles = {f"knn-k{PRIMARY}": f"k-NN (k={PRIMARY})", f"knn-uncentred-k{PRIMARY}": "uncentred"}
    found = (
        (
            (results.run_of(row), f"{row['train_n']:,}", row["pooling"]),
            titles.get(row["protocol"], ""),
            row["subset_seed"],
            results.correct(folders[row["run"]], row) if row["protocol"] in titles else "",
        )
        for row in rows
    )
    return text_tables.accuracies(["backbone", "labels", "features"], list(titles.values()), found)


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_held_out(parser)
    parser.add_argument("--k", type=int, nargs="+", help=f"default: {' '.join(map(str, KS))}")
    args = parser.parse_args()
    request = cli.EvalRequest(args)
    rows = [row for source in request.sources for row in evaluate(source, request, args.k)]
    if not rows:
        return
    cli.announce(rows)
    say(table(rows, request.folders))
    fewest = min(row["train_n"] for row in rows)
    skipped = sorted(k for k in {*(args.k or KS), PRIMARY} if k > fewest)
    if skipped:
        compared = f", so that no report compares them by k = {PRIMARY}" if PRIMARY in skipped else ""
        say(f"k = {', '.join(map(str, skipped))} left out where there are only {fewest} training images{compared}.")
    if request.config.name == "digits" and any(row["recipe"] == "pixels" for row in rows):
        say(
            "\nOn these 8x8 digits raw pixels win: this is a smoke test. The real comparison starts with natural "
            "images, such as --data cifar10."
        )


if __name__ == "__main__":
    errors.run(main)
