"""The README.md of exported weights: what they are, what they saw, how good they are, how to load them."""

import json
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import binomtest

from ssl_vit import __version__
from ssl_vit.backbones import Backbone, factory
from ssl_vit.checkout import commits, in_words
from ssl_vit.checkpoint import Run

LOADED = {
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)   # or "hf-hub:OWNER/NAME"',
    "hf": "from transformers import AutoImageProcessor, {kind}\n\n"
    'model = {kind}.from_pretrained("FOLDER"{options})   # or "OWNER/NAME"\n'
    'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
    'outputs = model(**processor(image, return_tensors="pt"))\n{read}',
    "onnx": 'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
    'outputs = session.run({names}, {{"images": images}})   # float32 ({shape}) in [0, 1]',
    "torch": 'import torch\n\nmodel = torch.export.load("model.pt2").module()\n'
    "{outputs} = model(images)   # float32 ({shape}) in [0, 1]",
}
LIBRARY = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "torch": "pytorch"}
UNSTATED = "No licence is stated: ask the authors before you use these weights (`--license` states one)."


def card(
    name: str,
    backbone: Backbone,
    to: str,
    run: Path | None,
    settings: dict[str, Any],
    classes: list[str] | None,
    licence: str | None,
    command: str,
    kind: str = "AutoModel",
) -> str:
    """The text in Markdown, with the hub's metadata on top.

    run: the run directory, with settings, its recipe.yaml; None for weights of another codebase. kind: transformers'
    class.
    """
    head = dict(library_name=LIBRARY[to], tags=["ssl_vit", "self-supervised-learning", "vision-transformer"])
    count, architecture = backbone.model.num_classes, backbone.model.pretrained_cfg["architecture"]
    head |= dict(pipeline_tag="image-classification" if count else "image-feature-extraction")
    head |= dict(license=licence) if licence else {}
    view, (height, width) = backbone.evaluation_view, backbone.input_size
    size = f"batch, {len(backbone.mean)}, {height}, {width}"
    names = ["pooled", "patches", "logits"] if count else ["pooled", "patches"]
    # else a ViTModel gets a pooler with random weights
    options = ", add_pooling_layer=False" if kind == "ViTModel" else ""
    read = (
        "outputs.last_hidden_state[:, 0]   # the class token; the mean of the patches: "
        f"outputs.last_hidden_state[:, {backbone.num_prefix_tokens}:].mean(1)"
    )
    read = "outputs.logits" if count else "outputs.logits   # the pixels of all patches" if "MAE" in kind else read
    code = LOADED[to].format(
        kind=kind, shape=size, names=json.dumps(names), outputs=", ".join(names), options=options, read=read
    )
    if to == "timm" and architecture in factory.OURS:
        code = code.replace("import timm\n", f"import ssl_vit   # registers {architecture}\nimport timm\n", 1)
    parameters = sum(p.numel() for p in backbone.model.parameters())
    what = f"a classifier of {count} classes" if count else "a backbone, without a classifier"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---",
        f"# {name}",
        f"{architecture}, {parameters / 1e6:.2f} M parameters: {what}. Made with ssl_vit {__version__}.",
        f"```python\n{code}\n```",
        f"Images of {height}x{width} pixels ({view.interpolation}, crop {view.crop_pct:g}, {view.crop_mode}); mean "
        f"{_numbers(backbone.mean)}, standard deviation {_numbers(backbone.std)} of values in [0, 1].",
    ]
    if classes:
        shown = ", ".join(classes[:50]) + (f" and {len(classes) - 50:,} more" if len(classes) > 50 else "")
        parts += [f"## Classes\n\n{shown}."]
    if run is not None:
        parts += [f"## Training\n\n{_trained(run, settings)}", _data(run), _results(run)]
    parts += [f"## Licence\n\n{licence or UNSTATED}", f"## Command\n\n```bash\n{command}\n```"]
    if run is not None:
        recipe = {key: settings[key] for key in settings if key != "images"}
        parts += [f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()}\n```"]
    return "\n\n".join(filter(None, parts)) + "\n"


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.4g}" for value in values.flatten().tolist())


def _trained(run: Path, settings: dict[str, Any]) -> str:
    train, images = settings["train"], settings["images"]
    start = settings["backbone"].get("init_from")
    text = (
        f"Recipe {settings['recipe']} ({settings['objective']['name']}) on {settings['data']['name']}: "
        f"{images['count']:,} images, {train['steps']:,} steps of {train['batch_size']}, seed {train['seed']}"
    )
    text += f", started from {start}." if start else ", from scratch."
    text += f" Commit of ssl_vit: {in_words(commits(settings, Run(run).read_log()))}."
    others = sorted({*settings.get("resolved", {}).get("published", []), *([start] if start else [])})
    return text + (f" The licence and training data of {' and '.join(others)} also apply." if others else "")


def _data(run: Path) -> str:
    """The ledger of the training images."""
    file = run / "images.json"
    if not file.exists():
        return ""
    entry = json.loads(file.read_text(encoding="utf-8"))
    part = f" of {entry['used_of_split']:,}" if "used_of_split" in entry else ""
    lines = [f"- {entry['title']}: {entry['used']:,} images{part} used, {len(entry['broken'])} broken left out"]
    for key, words in (("formats", "formats"), ("modes", "modes"), ("labels_per_class", "images per class")):
        if entry.get(key):
            values = list(entry[key].items())
            rest = f" and {len(values) - 20} more" if len(values) > 20 else ""
            lines.append(f"- {words}: " + ", ".join(f"{k} {v:,}" for k, v in values[:20]) + rest)
    left_out = {k: v for k, v in entry["found"].get("left_out", {}).items() if v}
    if left_out:
        lines.append("- left out: " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in left_out.items()))
    return "### Data\n\n" + "\n".join(lines)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The accuracies of these weights: of a run the rows in it; of a fine-tuning those that its evaluation left in the
    run that was fine-tuned, told by the name of the training."""
    fine_tuned = run.parent.name == "finetune"
    file = (run.parent.parent if fine_tuned else run) / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    rows = [row for row in rows if row["metric"] == "accuracy"]
    if not fine_tuned:
        return [row for row in rows if not row["protocol"].startswith("finetune")]
    return [row for row in rows if row.get("settings", {}).get("training") == run.name]


def _results(run: Path) -> str:
    rows = rows_of(run)
    if not rows:
        return "## Results\n\nNone were measured."
    lines = ["| images | protocol | features | labels | accuracy, % | n |", "|---|---|---|---|---:|---:|"]
    for row in rows:
        n, draw = row["n"], row["subset_seed"]
        layer = "" if row["layer"] == -1 else f", block {row['layer'] + 1}"
        labels = f"{row['train_n']:,}" + ("" if draw is None else f", draw {draw}")
        low, high = binomtest(round(row["value"] * n), n).proportion_ci(method="wilson")
        lines.append(
            f"| {row['eval_data']}, {row['split']} | {row['protocol']} | {row['pooling']}{layer} | {labels} "
            f"| {100 * row['value']:.1f} ({100 * low:.1f} to {100 * high:.1f}) | {n:,} |"
        )
    words = "In brackets: the 95 % interval over test images (Wilson); other seeds of the training vary on top."
    return "## Results\n\n" + "\n".join(lines) + f"\n\n{words}"
