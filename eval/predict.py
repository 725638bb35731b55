"""Predict the class of every image, with its probability, by a classifier.

    python eval/predict.py --backbone RUN --data NAME|PATH|owner/name [--output FILE.csv|FILE.parquet]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/linear_probe.py --backbone runs/mae-digits-s0
    python eval/predict.py --backbone runs/mae-digits-s0 --data digits

RUN is a fine-tuned run (in RUN/finetune/), another model with a classifier, or a backbone whose linear probe was kept:
eval/linear_probe.py does that. Where the images have labels, the accuracy and the most confident mistakes are printed.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from eval.compare.intervals import interval
from eval.compare.words import with_interval
from eval.measure import cli, everything, features, kept_probes, probing
from eval.page.text_tables import aligned
from ssl_vit import errors, files, system
from ssl_vit.commands import Parser
from ssl_vit.errors import UserError, say
from ssl_vit.recipe import short

MISTAKES = 10
Row = dict[str, str | float]


class Answers(NamedTuple):
    """The most probable class of images, int64 (n,), and its probability, float32 (n,)."""

    classes: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of(cls, found: np.ndarray) -> "Answers":
        """From the probabilities of all classes, (n, K)."""
        best = found.argmax(1)
        return cls(best, found[np.arange(len(found)), best])

    @classmethod
    def joined(cls, parts: Iterable["Answers"]) -> "Answers":
        none = cls(np.empty(0, np.int64), np.empty(0, np.float32))
        return cls(*(np.concatenate(arrays) for arrays in zip(none, *parts, strict=True)))


def by_probe(
    source: features.Source, images: everything.Images, state: PartialState, probe: kept_probes.KeptProbe
) -> Answers:
    """What a kept probe says of all images, on every process."""
    parts = []
    for split in images.splits:
        arrays = features.extract(source, split, state, probe.blocks)
        rows = probing.combine(arrays, probe.pooling, probe.blocks, np.arange(len(split)))
        parts += [Answers.of(probe(chunk)) for chunk in rows.chunks()]
    return Answers.joined(parts)


@torch.inference_mode()
def by_model(source: features.Source, images: everything.Images, state: PartialState) -> Answers:
    """What the model's own classifier says of all images. Every process works on some, and returns all."""
    source.network.to(state.device)
    compute = features.Piecewise(lambda part: source.logits(part).softmax(1).cpu().numpy())
    splits = []
    for split in images.splits:
        mine = np.array_split(np.arange(len(split)), state.num_processes)[state.process_index]
        views = everything.data.evaluation_views(
            split, source.network.evaluation_view, state.device, torch.from_numpy(mine)
        )
        own = Answers.joined(Answers.of(found) for batch in views for found in compute(batch))
        splits.append(Answers.joined(gather_object([own])))
    return Answers.joined(splits)


def class_names(source: features.Source) -> list[str]:
    """The names of a model's classes: of a run, or those in the config.json of a timm folder; else their numbers.

    Raises UserError if they are of another number.
    """
    count = source.network.model.num_classes
    names = source.settings.get("images", {}).get("classes")
    config = Path(source.name) / "config.json"
    if names is None and config.is_file():
        told = json.loads(config.read_text(encoding="utf-8"))
        labels = told.get("id2label")
        names = told.get("label_names") or (labels and [labels[key] for key in sorted(labels, key=int)])
    names = [str(i) for i in range(count)] if names is None else list(map(str, names))
    if len(names) != count:
        raise UserError(f"{source.name} classifies into {count} classes and names {len(names)}: mend its class names.")
    return names


def rows_of(images: everything.Images, found: Answers, classes: list[str]) -> Iterator[Row]:
    """One row an image: name, split, class, probability, and label where it has one."""
    labels, names = images.labels, images.classes
    for i, (name, split) in enumerate(zip(images.files, images.split_names, strict=True)):
        row: Row = dict(
            name=name,
            split=split,
            predicted=classes[found.classes[i]],
            probability=round(float(found.probabilities[i]), 6),
        )
        if labels is not None and names is not None:
            row["label"] = names[labels[i]] if labels[i] >= 0 else ""
        yield row


def write(target: Path, rows: list[Row]) -> None:
    """Write a table, as CSV or Parquet by its suffix."""
    with files.writing(target) as partial:
        if target.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        else:
            text = io.StringIO()
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            partial.write_text(text.getvalue(), encoding="utf-8")


def judged(rows: list[Row], classes: list[str], parts: list[str]) -> str:
    """The accuracy on each part, and the most confident mistakes, of rows with labels; "" if none has one that the
    model knows. parts: the name of each row's split, or of the part of one that was divided for reports; a classifier
    of these images was trained on the first, if there are several."""
    known = [row for row in rows if row.get("label") in classes]
    if not known:
        return ""
    names = list(dict.fromkeys(parts))
    lines = []
    for name in names:
        here = [row for row, part in zip(rows, parts, strict=True) if part == name and row.get("label") in classes]
        right = np.array([row["predicted"] == row["label"] for row in here])
        if len(right):
            accuracy = f"{with_interval(interval(right[None]))} % are correct"
            seen = "; a classifier of this data set was trained on them" if name == names[0] and names[1:] else ""
            lines.append(f"{name}: {len(right):,} labelled images: {accuracy}{seen}.")
    strangers = sum(bool(row.get("label")) for row in rows) - len(known)
    lines += [f"{strangers:,} images have a label that the model does not know."] if strangers else []
    text = "\n".join(lines)
    wrong = sorted(
        (row for row in known if row["predicted"] != row["label"]), key=lambda row: -float(row["probability"])
    )
    if wrong:
        keys = ["split", "name", "label", "predicted"][len({row["split"] for row in rows}) == 1 :]
        cells = [[*(str(r[key]) for key in keys), f"{float(r['probability']):.2f}"] for r in wrong[:MISTAKES]]
        text += "\n\nThe most confident mistakes:\n\n"
        text += aligned([[*keys, "probability"], *cells], left=len(keys))
    return text


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--backbone", required=True, help="a fine-tuned run, or a run or weights with a kept probe")
    parser.add_argument("--data", required=True, help="the images: a name, a folder or owner/name")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help=".csv or .parquet; default: RUN/predictions-DATA.csv"
    )
    parser.add_argument("--probe", type=Path, metavar="FILE", help="one of RUN/probes/, if there are several")
    cli.add_precision(parser)
    parser.add_argument("--threads", type=cli.positive, help="CPU threads; default: cores")
    args = parser.parse_args()
    if args.output and args.output.suffix not in (".csv", ".parquet"):
        raise UserError(f"--output {args.output} must end in .csv or .parquet.")
    system.prepare(args.threads or "auto")
    state = cli.processes()
    given = features.named(args.data)
    source = features.open_source(args.backbone, given, None)
    if source.backbone is None:
        raise UserError(f"{args.backbone} has no classifier: pass a fine-tuned run, or one with a kept probe.")
    own = source.network.model.num_classes and args.probe is None
    probe = None if own else kept_probes.read(source, args.probe)
    asked = probe.precision if probe and args.precision == "auto" else args.precision
    source.precision = system.precision(asked, state.device.type == "cuda")
    system.set_products(source.precision)
    config = features.seen_by(source, given)
    if probe and probe.range:
        config.range = probe.range
    images = everything.load(config, len(source.network.mean), state.device)
    found = by_probe(source, images, state, probe) if probe else by_model(source, images, state)
    if not state.is_main_process:
        return
    classes = probe.classes if probe else class_names(source)
    rows = list(rows_of(images, found, classes))
    target = args.output or source.folder / f"predictions-{short(given.name)}.csv"
    write(target, rows)
    if text := judged(rows, classes, images.parts):
        say(f"{text}\n")
    say(f"Written: {target} ({len(rows):,} images)")


if __name__ == "__main__":
    errors.run(main)
