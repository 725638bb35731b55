"""k-NN accuracy of frozen features, beside the controls.

    python eval/knn.py --backbone RUN [RUN|timm name|timm folder|pixels|pixels-pca64 …] [--data NAME|PATH|owner/name]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/knn.py --backbone runs/mae-digits-s0 pixels

The neighbours are training images, the queries those of the report split. Primary protocol: features centred by the
training mean, unit length, k = 20, weights exp(similarity / 0.07). DINO's protocol is the same without centring.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import torch

from eval import features, results
from ssl_vit import data, errors, neighbours
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

KS = (1, 5, 10, 20, 100, 200)
PRIMARY = 20


def evaluate(
    source: features.Source, train: data.ImageSet, test: data.ImageSet, device: torch.device, ks: list[int]
) -> list[dict]:
    """The rows of one backbone, a row for each pooling, centring and k; they are written to its folder."""
    started = time.perf_counter()
    bank, queries = (features.extract(source, images, device) for images in (train, test))
    labels, truth = train.labels.cpu().numpy(), test.labels.cpu().numpy()
    common = results.describe_run(source.folder, source.settings) | dict(
        backbone=source.settings.get("backbone", {}).get("name", source.name),
        eval_data=test.name,
        split=test.split,
        layer=-1,
        label_fraction=1.0,
        subset_seed=None,
        chosen="last checkpoint",
        n=len(truth),
        metric="accuracy",
        eval_flops=bank.flops + queries.flops,
        **results.surroundings(),
    )
    if source.backbone is None:
        common |= dict(recipe=source.name)
    rows, predictions = [], []
    for pooling, vectors in bank.by_pooling.items():
        pair = vectors, queries.by_pooling[pooling]
        if source.name == "pixels-pca64":
            pair = features.pca(*pair)
        for protocol, centre in (("knn", True), ("knn-uncentred", False)):
            near, asked = neighbours.prepare(*pair, centre=centre)
            for k, answer in neighbours.vote(near, labels, asked, ks, len(train.classes)).items():
                value = float((answer == truth).mean())
                rows.append(common | dict(protocol=f"{protocol}-k{k}", pooling=pooling, value=value))
                predictions.append(answer)
    for row in rows:
        row["seconds"] = round(time.perf_counter() - started, 3)
    results.write(source.folder, rows, predictions, truth)
    return rows


def load(config: recipes.Data, device: torch.device) -> tuple[data.ImageSet, data.ImageSet]:
    """The training images and those of the report split. Raises UserError if either has no labels."""
    train = data.load(config, "train").to(device)
    test = data.load(dataclasses.replace(config, channels=train.channels), "report", train.classes).to(device)
    if train.labels is None or test.labels is None:
        raise UserError(f"k-NN needs labels, and {config.name} has none in its {train.split} or {test.split} split.")
    return train, test


def table(rows: list[list[dict]]) -> str:
    """Primary and uncentred accuracy per backbone and pooling, in percent, as Markdown."""
    lines = ["| backbone | features | k-NN (k=20) | uncentred |", "|---|---|---:|---:|"]
    for of_backbone in rows:
        poolings = dict.fromkeys(row["pooling"] for row in of_backbone)
        for pooling in poolings:
            value = {r["protocol"]: r["value"] for r in of_backbone if r["pooling"] == pooling}
            name = of_backbone[0]["run"] + (" (random init)" if of_backbone[0]["recipe"] == "random" else "")
            shown = [value[p] for p in (f"knn-k{PRIMARY}", f"knn-uncentred-k{PRIMARY}")]
            lines.append(f"| {name} | {pooling} | " + " | ".join(f"{100 * v:.1f}" for v in shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", nargs="+", required=True, help="runs, timm models or folders, pixels, pixels-pca64"
    )
    parser.add_argument("--data", help="default: the images of the first run's pre-training")
    parser.add_argument("--k", type=int, nargs="+", help=f"default: {' '.join(map(str, KS))}")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = recipes.Data(name=args.data) if args.data else None
    size, sources = None, []
    for name in args.backbone:
        source = features.open_source(name, config, size)
        config = config or source.data()
        size = size or source.size
        sources.append(source)
    train, test = load(config, device)
    count = len(train)
    ks = args.k or [k for k in KS if k <= count]
    if max(ks) > count or min(ks) < 1:
        raise UserError(f"--k must lie between 1 and the {count} training images, and {max(ks)} does not.")
    if PRIMARY not in ks:
        ks.append(PRIMARY)

    rows = [evaluate(source, train, test, device, sorted(ks)) for source in sources]
    print(f"\nk-NN on {rows[0][0]['eval_data']} ({rows[0][0]['split']}, n = {rows[0][0]['n']:,}), accuracy in %\n")
    print(table(rows))
    skipped = [k for k in KS if k > count and not args.k]
    if skipped:
        print(f"k = {', '.join(map(str, skipped))} left out: there are {count} training images.")
    if config.name == "digits" and Path("pixels") in map(Path, args.backbone):
        print(
            "\nOn these 8x8 digits raw pixels win: this is a smoke test. The real comparison starts at natural images, "
            "such as --data cifar10."
        )


if __name__ == "__main__":
    errors.run(main)
