"""Write a run's weights for other libraries: timm, transformers, ONNX or torch.export, with a model card.

    python ssl_vit/export.py RUN --to timm|hf|onnx|torch [--decoder] [--output DIR] [--push owner/name]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python ssl_vit/export.py runs/mae-digits-s0 --to hf

RUN may be a fine-tuned run (RUN/finetune/…), whose classifier and class names go along, or any weights of
docs/weights.md. hf: a ViTModel, or with --decoder a ViTMAEForPreTraining. onnx and torch: a graph that takes images in
[0, 1] and standardises them itself; what was written is run once, and refused if its outputs differ.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import ssl_vit  # noqa: F401  # isort: skip  before torch

import torch
from safetensors.torch import save_file

from ssl_vit import checkpoint, errors, files, model_card, shards, weights
from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone
from ssl_vit.commands import Parser, typed
from ssl_vit.errors import UserError, say
from ssl_vit.weights import graphs, to_hugging_face


def export(
    source: str,
    to: str,
    output: Path | None = None,
    decoder: bool = False,
    classes: Path | None = None,
    licence: str | None = None,
) -> Path:
    """Write the folder and return it. classes: a text with the names for a classifier whose run does not tell them.

    Raises UserError for what the other library has no place for, and for a folder that is there already.
    """
    run = Path(source) if (Path(source) / "recipe.yaml").exists() else None
    if run is None and output is None:
        raise UserError(f"{source} is no run that could hold the export: name a folder with --output.")
    backbone = weights.load(source).eval()
    settings = recipes.read_settings(run / "recipe.yaml") if run else {}
    names = class_names(source, backbone, settings, lines_of(classes) if classes else None)
    if decoder and (to != "hf" or run is None):
        raise UserError("--decoder is for --to hf and a run of ours, whose checkpoint holds the decoder: leave it out.")
    target = output or Path(source) / "export" / (f"{to}-decoder" if decoder else to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: remove it, or choose another --output.")
    with files.writing(target) as folder:
        kind = write(backbone, to, folder, names, decoder_of(run) if decoder and run else None, settings)
        words = [*typed("export"), source, "--to", to]
        words += ["--decoder"] if decoder else []
        for option, value in (("--output", output), ("--classes", classes), ("--license", licence)):
            words += [option, str(value)] if value else []
        name = run.resolve().name if run else Path(weights.parse(source).where).name
        text = model_card.card(name, backbone, to, run, settings, names, licence, shlex.join(words), kind)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return target


def write(
    backbone: Backbone,
    to: str,
    folder: Path,
    classes: list[str] | None,
    decoder: to_hugging_face.Tensors | None,
    settings: dict[str, Any],
) -> str:
    """Write all but the model card into `folder`, which is made; returns transformers' class that reads it."""
    if to == "timm":
        weights.save(backbone, folder, classes)
        return ""
    if to == "hf":
        if decoder is not None:
            tensors, config = to_hugging_face.convert_mae(backbone, decoder, settings["objective"])
        else:
            tensors, config = to_hugging_face.convert(backbone, classes)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
        (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        processor = to_hugging_face.processor(backbone)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
        return str(config["architectures"][0])
    folder.mkdir()
    if to == "onnx":
        graphs.to_onnx(backbone, folder / "model.onnx", classes)
    else:
        graphs.to_torch(backbone, folder / "model.pt2", classes)
    return ""


def class_names(source: str, backbone: Backbone, settings: dict[str, Any], given: list[str] | None) -> list[str] | None:
    """The names of the classifier's classes, or None. Raises UserError if they are of another number."""
    count = backbone.model.num_classes
    if not count:
        if given:
            raise UserError(f"{source} has no classifier: leave --classes out, or export a fine-tuned run.")
        return None
    names = given or settings.get("images", {}).get("classes")
    if names is not None and len(names) != count:
        raise UserError(
            f"{source} classifies into {count} classes, and there are {len(names)} names: pass {count} with --classes."
        )
    return None if names is None else list(map(str, names))


def decoder_of(run: Path) -> to_hugging_face.Tensors:
    """The decoder's tensors in a run's checkpoint, by their names in it. Raises UserError without a checkpoint."""
    path = max(checkpoint.Run(run).checkpoints().items(), default=(0, None))[1]
    if path is None:
        raise UserError(f"{run} has no checkpoint, which alone holds the decoder: leave --decoder out.")
    start = "objective.decoder."
    with checkpoint.reading(path):
        if path.is_dir():  # of several processes
            found = {name: torch.empty(size) for name, size in shards.sizes(path).items() if name.startswith(start)}
            shards.read(path, found)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)["objective"]
            found = {f"objective.{name}": tensor for name, tensor in stored.items()}
    return {name.removeprefix(start): tensor for name, tensor in found.items() if name.startswith(start)}


def push(folder: Path, name: str) -> str:
    """Upload a folder to the hub as a model of this name, which is made if there is none; returns its address.

    Raises UserError, with the remedy, if the hub does not take it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(name, repo_type="model", exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Weights by ssl_vit")
    except Exception as error:  # the hub's client raises a dozen types of its own for what is one thing to the user
        raise UserError(
            f"The hub did not take {name} ({type(error).__name__}): run hf auth login with a token that may write, "
            f"check the name and the network; the export itself is in {folder}."
        ) from None
    return address


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="RUN", help="a run, or weights as in docs/weights.md")
    parser.add_argument("--to", required=True, choices=["timm", "hf", "onnx", "torch"], help="the library")
    parser.add_argument("--output", type=Path, metavar="DIR", help="a new folder; default: RUN/export/TO")
    parser.add_argument("--decoder", action="store_true", help="hf: with MAE's decoder, as a ViTMAEForPreTraining")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--license", metavar="ID", help="for the model card, as the hub names it: apache-2.0")
    parser.add_argument("--push", metavar="owner/name", help="upload the folder to the Hugging Face hub")
    args = parser.parse_args()
    folder = export(args.source, args.to, args.output, args.decoder, args.classes, args.license)
    say(f"Written: {folder} ({', '.join(sorted(file.name for file in folder.iterdir()))}).")
    if args.push:
        say(f"Uploaded: {push(folder, args.push)}")


def lines_of(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises UserError if it cannot be read."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): pass a text with a class name on every line.") from None


if __name__ == "__main__":
    errors.run(main)
