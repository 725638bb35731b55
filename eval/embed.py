"""Features of all images of a set, in one file, and a page of what is in them. No labels are needed.

    python eval/embed.py --backbone RUN|WEIGHTS [--data NAME|PATH|owner/name] [--format parquet|npz] [--patches]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/embed.py --backbone runs/mae-digits-s0

It writes features.parquet or features.npz, with the name and split of each image, its features (cls, the class token,
and mean, the mean of the patches; patches with --patches), its outlier score, group and place on the map; and
embedding.html: nearest neighbours, near-duplicates and outliers, k-means groups, a map, and what the patches see.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np
import torch
from accelerate import PartialState

from eval.measure import cli, embedding, everything, features
from eval.page import embedding_page
from eval.page.document import html
from ssl_vit import errors, files, system
from ssl_vit.commands import Parser
from ssl_vit.errors import UserError, say
from ssl_vit.recipe import short
from ssl_vit.settings import known

if TYPE_CHECKING:
    import pyarrow

Columns = dict[str, np.ndarray]


def embed(source: features.Source, images: everything.Images, state: PartialState) -> Columns:
    """{"cls": (n, D), "mean": (n, D)} of all images; without a class token "mean" alone."""
    parts = [features.extract(source, part, state).poolings(-1) for part in images.splits]
    return {pooling: np.concatenate([part[pooling] for part in parts]) for pooling in parts[0]}


@torch.inference_mode()
def patches_of(source: features.Source, images: everything.Images, state: PartialState) -> Iterator[np.ndarray]:
    """Patch features of all images, a few at a time, float16 (b, H, W, D)."""
    view = source.network.evaluation_view
    compute = features.Piecewise(lambda part: source.features(part)[0][1].half().cpu().numpy())
    for part in images.splits:
        for batch in everything.data.evaluation_views(part, view, state.device):
            for found in compute(batch):
                if not np.isfinite(found).all():
                    raise UserError(f"Features of patches of {source.name} exceed 16 bits: leave --patches out.")
                yield found


def write(
    target: Path,
    images: everything.Images,
    columns: Columns,
    found: embedding.Findings,
    patches: Iterator[np.ndarray] | None = None,
) -> None:
    """Write the columns and what was found, as Parquet or NumPy's npz by the suffix of `target`; with the features of
    patches, of which Parquet takes a few images at a time and npz all."""
    names, splits, labels, classes = images.files, images.split_names, images.labels, images.classes
    places = np.full((len(images), 2), np.nan, np.float32)
    places[found.mapped] = found.places
    table: Columns = dict(
        name=np.array(names), split=np.array(splits), outlier=found.outlier, group=found.group, map=places
    )
    if labels is not None and classes is not None:
        table["label"] = np.array([classes[i] if i >= 0 else "" for i in labels])
    table |= columns
    with files.writing(target) as partial:
        if target.suffix == ".npz":
            table |= {} if patches is None else dict(patches=np.concatenate([*patches]))
            with open(partial, "wb") as stream:
                np.savez(stream, **cast(dict[str, Any], table))
            return
        import pyarrow.parquet

        start, writer = 0, None
        for block in patches or [None]:
            end = len(images) if block is None else start + len(block)
            part = {name: values[start:end] for name, values in table.items()}
            made = arrow(part if block is None else part | dict(patches=block))
            writer = writer or pyarrow.parquet.ParquetWriter(partial, made.schema)
            writer.write_table(made)
            start = end
        known(writer).close()


def arrow(columns: Columns) -> "pyarrow.Table":
    """The columns as a table of Parquet: further axes than the first become one, patches' shape a note."""
    import pyarrow

    made = {}
    for name, values in columns.items():
        if values.ndim == 1:
            made[name] = pyarrow.array(values.tolist() if values.dtype.kind == "U" else values)
        else:
            flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
            made[name] = pyarrow.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    shape = {"patches_shape": str(list(columns["patches"].shape[1:]))} if "patches" in columns else {}
    return pyarrow.table(made).replace_schema_metadata(shape)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--backbone", required=True, help="a run, or weights as in docs/weights.md")
    parser.add_argument("--data", help="a name, a folder or owner/name; default: the images of the run")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RUN/embedding/DATA")
    parser.add_argument("--format", choices=["parquet", "npz"], default="parquet", help="of the features")
    parser.add_argument("--patches", action="store_true", help="write the features of all patches too")
    parser.add_argument("--groups", type=cli.positive, metavar="K", help="k-means groups; default: by count, at most 8")
    parser.add_argument(
        "--duplicates",
        type=float,
        default=0.95,
        metavar="S",
        help="least similarity of near-duplicates (default: 0.95)",
    )
    cli.add_precision(parser)
    parser.add_argument("--threads", type=cli.positive, help="CPU threads; default: cores")
    args = parser.parse_args()
    system.prepare(args.threads or "auto")
    state = cli.processes()
    given = features.named(args.data) if args.data else None
    source = features.open_source(args.backbone, given, None)
    source.precision = system.precision(args.precision, state.device.type == "cuda")
    system.set_products(source.precision)
    if source.backbone is None:
        raise UserError(f"{args.backbone} is no backbone: pass a run, a file or folder of weights, or a timm model.")
    config = features.seen_by(source, given or features.data_of(source.settings))
    images = everything.load(config, len(source.network.mean), state.device)
    if len(images) < 2:
        raise UserError(f"{config.name} holds a single image, which there is nothing to compare with: pass more.")
    columns = embed(source, images, state)
    if not state.is_main_process:
        return
    space = next(iter(columns))
    found = embedding.examine(columns[space], args.groups)
    folder = args.output or source.folder / "embedding" / short(config.name)
    target = folder / f"features.{args.format}"
    write(target, images, columns, found, patches_of(source, images, state) if args.patches else None)
    blocks = embedding_page.blocks(source, images, found, space, args.duplicates, target.name)
    files.write(folder / "embedding.html", html(f"{images.name}, embedded by {Path(source.name).name}", blocks))
    written = ", ".join([*columns, "patches"] if args.patches else columns)
    say(f"Written: {target} ({len(images):,} images; {written}) and {folder / 'embedding.html'}")


if __name__ == "__main__":
    errors.run(main)
