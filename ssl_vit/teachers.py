"""What a run learns from: finished runs and published models. They are frozen, and the FLOPs spent on them count."""

from pathlib import Path

from ssl_vit import files, weights
from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone, TokenBackbone
from ssl_vit.errors import UserError


def load(text: str, channels: int) -> Backbone:
    """The frozen backbone of a run or a model that objective.teacher names, as `weights.load`.

    Raises UserError if it takes images of other than this many channels.
    """
    teacher = weights.load(text).requires_grad_(False).eval()
    if len(teacher.mean) != channels:
        raise UserError(
            f"objective.teacher={text} takes images of {len(teacher.mean)} channel(s), and these have {channels}: name "
            f"another, or set data.in_chans={len(teacher.mean)}."
        )
    return teacher


def load_patches(text: str, channels: int, grid: tuple[int, int]) -> TokenBackbone:
    """The same, a plain ViT whose patches lie in this grid (H, W): its positions are resampled to it.

    Raises UserError if it is no plain ViT.
    """
    teacher = load(text, channels)
    if not isinstance(teacher, TokenBackbone):
        raise UserError(f"objective.teacher={text} is no plain ViT, and has no features of patches: name one that is.")
    size = grid[0] * teacher.patch_size[0], grid[1] * teacher.patch_size[1]
    resized = load_for(text, channels, size)
    assert isinstance(resized, TokenBackbone)  # as the one of another size
    return resized


def load_for(text: str, channels: int, size: tuple[int, int]) -> Backbone:
    """The same, for images of this size (H, W): a plain ViT's positions are resampled to it."""
    teacher = load(text, channels)
    if isinstance(teacher, TokenBackbone) and teacher.input_size != size:
        return load(f"{text},img_size={size[0]},{size[1]}", channels)
    return teacher


def classes(text: str) -> list[str] | None:
    """The names of the classes that a run was trained on, in order; None for anything else."""
    file = Path(text) / "recipe.yaml"
    found: list[str] | None = recipes.read_settings(file)["images"]["classes"] if file.exists() else None
    return found


def cost(text: str) -> dict[str, float]:
    """{run directory: the FLOPs spent on it}, and the same of all that it learnt or started from, each once. {} for
    published weights, whose training nobody counted.

    Raises UserError for a trained run without its log, which tells the cost.
    """
    run = weights.parse(text).path
    if not (run / "recipe.yaml").exists():
        return {}
    settings = recipes.read_settings(run / "recipe.yaml")
    lines = files.read_lines(run / "log.jsonl")
    spent = max((line["flops"] for line in lines if "flops" in line), default=0.0)
    if not spent and settings["train"]["steps"]:
        raise UserError(
            f"{run} was trained, and its log.jsonl, which tells how many FLOPs that took, is not there: copy that too."
        )
    before = settings.get("runtime", {})  # as it was counted when the run began
    learnt_from: dict[str, float] = before.get("learnt_from", {})  # which the log includes
    return {str(run.resolve()): spent - sum(learnt_from.values())} | learnt_from | before.get("started_from", {})


def published(text: str) -> list[str]:
    """The weights of other codes that are behind these: themselves, or what a run started from or learnt from."""
    file = weights.parse(text).path / "recipe.yaml"
    if not file.exists():
        return [text]
    found: list[str] = recipes.read_settings(file).get("resolved", {}).get("published", [])
    return found
