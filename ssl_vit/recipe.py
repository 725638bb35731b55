"""A recipe: every setting of a run, merged, checked and resolved. Knows nothing of torch modules.

Precedence: defaults < dataset info < recipe file < command line (`key=value`). An unknown key, a wrong type or an
impossible value is refused before anything loads.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from ssl_vit.errors import Mistakes, UserError, nearest
from ssl_vit.settings import ReadIf, Setting, known, pair, setting, settings_of

RECIPES = Path(__file__).resolve().parent / "recipes"  # of a wheel
if not RECIPES.is_dir():  # of a checkout
    RECIPES = RECIPES.parent.parent / "recipes"


@dataclass
class Train:
    epochs: float | None = setting(None, "passes over the images; `steps` and `flops` win over it", above=0)
    steps: int | None = setting(None, "optimizer steps; 0 saves the random initialisation", at_least=0)
    flops: float | None = setting(None, "training budget in counted FLOPs", above=0)
    batch_size: int = setting(256, "images per optimizer step, over all processes", at_least=1)
    seed: int = setting(0, "seed of all random draws of the run", at_least=0, at_most=2**32 - 1)
    precision: Literal["auto", "fp32", "tf32", "bf16"] = setting(
        "auto",
        "auto: bf16 on GPUs of compute capability >= 8.0, else fp32; a resumed run keeps what it began with; tf32: "
        "fp32 with TF32 products",
    )
    freeze_backbone_fraction: float | None = setting(
        None,
        "fraction of the steps, at the start, in which heads and decoder are trained while the backbone is frozen; "
        "null: 0.05 of a self-supervised run with backbone.init_from, else 0",
        at_least=0,
        at_most=1,
    )


@dataclass
class Optim:
    name: Literal["adamw", "sgd"] = setting("adamw", "AdamW, or SGD with momentum")
    lr: float = setting(1e-3, "peak learning rate before `lr_rule`", above=0)
    lr_rule: Literal["absolute", "B/256", "B/512", "sqrt(B/1024)"] = setting(
        "absolute", "what `lr` is multiplied by; B is the global batch size"
    )
    min_lr: float = setting(0.0, "learning rate at the end of the cosine; `lr_rule` does not apply", at_least=0)
    warmup_fraction: float = setting(0.05, "fraction of the steps with linear warm-up", at_least=0, at_most=1)
    betas: list[float] = setting(
        [0.9, 0.95],
        "adamw: decay of the moving averages of gradients and of their squares",
        read_if=ReadIf("optim.name=adamw", lambda optim: optim.name == "adamw"),
    )
    momentum: float = setting(
        0.9,
        "sgd: decay of the sum of past gradients, below 1",
        at_least=0,
        read_if=ReadIf("optim.name=sgd", lambda optim: optim.name == "sgd"),
    )
    weight_decay: float = setting(
        0.05,
        "adamw: decoupled, multiplied by the learning rate alone; sgd: coupled, this part of the weights is added to "
        "the gradients",
        at_least=0,
    )
    weight_decay_end: float | None = setting(None, "end of a cosine that starts at `weight_decay`", at_least=0)
    no_weight_decay: Literal["1d", "1d+tokens"] = setting(
        "1d",
        "what is not decayed: biases and norms, or also positions and tokens (class, distillation, register, mask)",
    )
    layer_decay: float = setting(1.0, "learning rate of each block relative to the next", above=0, at_most=1)
    clip_grad: float | None = setting(None, "largest gradient norm", above=0)
    clip_mode: Literal["global", "parameter"] = setting(
        "global",
        "one norm for all, or (DINO) one per parameter",
        read_if=ReadIf("optim.clip_grad is set", lambda optim: optim.clip_grad is not None),
    )


@dataclass
class Data:
    name: str = setting("digits", "a known name, a path, or owner/name on the Hugging Face hub")
    config: str | None = setting(None, "the configuration of a data set that has several")
    image_column: str | None = setting(None, "the column that holds the images")
    label_column: str | None = setting(None, "the column that holds the labels")
    train_split: str | None = setting(None, "the split to train on")
    report_split: str | None = setting(None, "the split whose accuracies are reported")
    subset: float | None = setting(
        None, "train on a subset: below 1 a fraction of each class, otherwise a number of images per class", above=0
    )
    subset_seed: int = setting(0, "which images the subset holds; the subsets of one seed are nested", at_least=0)
    hold_out: bool = setting(False, "leave out a tenth of the training images, to choose settings on")
    img_size: int | list[int] | None = setting(
        None, "training resolution, S or [H, W]; the images' own if they share one"
    )
    in_chans: int | None = setting(None, "number of channels: 1 grey, 3 RGB, others as stored", at_least=1)
    mean: list[float] | None = setting(None, "mean of each channel, of pixels from 0 to 1", at_least=0, at_most=1)
    std: list[float] | None = setting(
        None, "standard deviation of each channel, of pixels from 0 to 1", above=0, at_most=1
    )
    hflip: bool | None = setting(None, "random horizontal flips; null: on, but for the digits")
    permute_pixels: bool = setting(
        False, "a control: one fixed permutation of each image's pixels, before all views, in evaluation too"
    )
    range: list[float] | None = setting(
        None, "[black, white] of images deeper than 8 bits; null: the bit depth, [0, 1] or span of the training images"
    )
    background: Literal["white", "black"] = setting(
        "white", "background for images with alpha; in_chans=4 keeps the alpha"
    )
    layout: Literal["hwc", "chw"] | None = setting(None, "axes of stored arrays whose shape is ambiguous")
    pages: Literal["first", "channels"] | None = setting(
        None, "files with several pages or frames: take the first, or all as channels; null: refuse"
    )
    cache_gb: float = setting(
        4.0, "images of one size are decoded once and kept in memory up to this limit", at_least=0
    )
    skip_broken: bool = setting(False, "leave out images that cannot be decoded, and count them")
    jpeg_draft: bool = setting(
        False,
        "photos: decode JPEGs at 1/2, 1/4 or 1/8 of their sides where the crops stay at least as large as the views; "
        "faster, and slightly other pixels",
    )

    @property
    def size(self) -> tuple[int, int]:
        """img_size as (H, W), once it is resolved."""
        assert self.img_size is not None
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else pair(self.img_size)


@dataclass
class Views:
    augmentation: Literal["none", "crop+flip", "dino", "three-augment", "rand-augment"] = setting(
        "crop+flip",
        "augmentation: none, crop and flip, or on top DINO's colours, DeiT III's 3-Augment or DeiT's RandAugment",
    )
    magnitude: float = setting(
        9.0,
        "rand-augment: mean of its magnitude",
        at_least=0,
        at_most=10,
        read_if=ReadIf("views.augmentation=rand-augment", lambda views: views.augmentation == "rand-augment"),
    )
    repeats: int = setting(
        1, "repeated augmentation: views of each image in a step, which then holds fewer images (DeiT: 3)", at_least=1
    )
    scale: list[float] = setting(
        [0.2, 1.0],
        "area of the random crop, as a fraction of the image",
        read_if=ReadIf("views.augmentation is not none", lambda views: views.augmentation != "none"),
    )
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear", "interpolation of crops and of the evaluation view; both antialiased"
    )
    blur: bool = setting(
        True,
        "blur in augmentation=dino; its sigma of up to 2 px is meant for 224 px",
        read_if=ReadIf("views.augmentation=dino", lambda views: views.augmentation == "dino"),
    )


WINDOWS = ReadIf("backbone.attn=window", lambda backbone: backbone.attn == "window")


@dataclass
class Backbone:
    name: str = setting(
        "vit_tiny",
        "vit_{tiny,small,base,large,huge}, a small swin, hybrid, cvt, resnet18 or resnet50, or any timm model "
        "(docs/backbones.md); on the command line it replaces the recipe's width, depth and heads, and its patch size "
        "if the name states one, as in vit_base_patch16_224",
    )
    embed_dim: int | None = setting(
        None,
        "token dimension, instead of the name's; channels of the first stage in a small swin, cvt or resnet",
        at_least=1,
    )
    depth: int | None = setting(None, "number of blocks", at_least=1)
    num_heads: int | None = setting(None, "number of attention heads", at_least=1)
    patch_size: int | Literal["auto"] | None = setting(
        "auto", "patch side; auto: up to 64 px the divisor of the size, at least 2, nearest to size/8", at_least=1
    )
    pos_embed: Literal["learned", "sincos"] = setting("learned", "position embedding; sincos is fixed")
    weight_init: Literal["trunc_normal", "xavier"] = setting(
        "trunc_normal", "initial linear weights: timm's and DINO's, or MAE's"
    )
    rescale_residual: bool = setting(
        False, "divide the last weights of block l's attention and MLP by sqrt(2 l) at the start, as BEiT"
    )
    attn: Literal["full", "axial", "window"] = setting(
        "full", "vit_*: full attention, rows and columns in alternating blocks (axial), or local windows (window)"
    )
    window_size: int = setting(4, "window: patches of a side", at_least=1, read_if=WINDOWS)
    global_every: int = setting(4, "window: every n-th block has full attention", at_least=1, read_if=WINDOWS)
    reg_tokens: int | None = setting(None, "number of register tokens; null: as the name says", at_least=0)
    init_values: float | None = setting(None, "initial layer scale", above=0)
    drop_path_rate: float = setting(0.0, "stochastic depth rate of the last block", at_least=0, at_most=0.99)
    init_from: str | None = setting(None, "start from this run, or from weights of another codebase: docs/weights.md")


@dataclass
class Monitor:
    log_every: int = setting(10, "steps between lines of log.jsonl", at_least=1)
    knn_every: int = setting(
        0, "steps between k-NN evaluations on a slice of the training images; 0: never", at_least=0
    )
    trackers: str = setting("auto", "auto: TensorBoard if installed; none; or names that Accelerate knows, joined by +")


@dataclass
class Runtime:
    per_device_batch_size: int | Literal["auto"] = setting(
        "auto",
        "images at a time on one device; auto: as many as fit on a CUDA GPU, elsewhere as keep tensors below 32 MB",
        at_least=1,
    )
    num_workers: int | Literal["auto"] = setting(
        "auto", "decoding processes, for images that do not fit the cache", at_least=0
    )
    num_threads: int | Literal["auto"] = setting("auto", "CPU threads; auto: cores / local processes", at_least=1)
    save_every: int = setting(500, "steps between checkpoints; the last one is kept", at_least=1)
    save_minutes: float | None = setting(10.0, "minutes between checkpoints, whichever comes first", above=0)
    keep_every: int = setting(
        0, "steps between backbones that are kept for the evaluators; 0: the last one only", at_least=0
    )
    compile: bool | Literal["auto"] = setting(
        "auto", "torch.compile the transformer blocks; auto: on CUDA, in runs of 5,000 steps and more"
    )
    channels_last: bool | Literal["auto"] = setting(
        "auto",
        "keep the channels of a pixel together in convolutional backbones; auto: on CUDA, without GroupNorm and fsdp2",
    )
    activation_checkpointing: bool = setting(
        False,
        "compute activations of the transformer blocks again in the backward pass: less memory, a third more FLOPs",
    )
    engine: Literal["auto", "ddp", "fsdp2"] = setting(
        "auto",
        "several processes: replicate the model (ddp) or shard it (fsdp2); auto: ddp, or as accelerate launch says",
    )


FREEZE = 0.05  # of the steps of a continued pre-training

SECTIONS = dict(train=Train, optim=Optim, data=Data, views=Views, backbone=Backbone, monitor=Monitor, runtime=Runtime)
MAY_CHANGE = ("runtime", "monitor")  # sections that may differ when a run goes on
ADDED = {"recipe", "resolved", "images"}  # what a run's recipe.yaml holds beside its settings
OF_IMAGES = (  # settings of one data set, or resolved from its images
    *("data.img_size", "data.in_chans", "data.mean", "data.std", "data.hflip", "data.range", "backbone.patch_size"),
    *("data.config", "data.image_column", "data.label_column", "data.train_split", "data.report_split"),
)
LENGTHS = ("train.epochs", "train.steps", "train.flops")  # each wins over those before it
COMMAND_LINE = "the command line"
BACKBONE_NAME = "the name of the backbone"
# settings that runs of earlier versions lack: at their defaults they are in no hash, so that those runs keep their name
ADDED_LATER = ("optim.name", "optim.momentum", "data.jpeg_draft")


@dataclass
class Recipe:
    """A checked recipe. `objective` is the Config of the objective named `objective_name`."""

    name: str
    objective_name: str
    objective: Any
    train: Train
    optim: Optim
    data: Data
    views: Views
    backbone: Backbone
    monitor: Monitor
    runtime: Runtime
    tag: str  # '' or a short hash of what the command line changed
    # by key, the settings that are not defaults: (the value as given, the file or COMMAND_LINE)
    given: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The settings as nested plain values, in the form of a recipe file."""
        sections: dict[str, Any] = {name: asdict(getattr(self, name)) for name in SECTIONS}
        return dict(recipe=self.name, objective=dict(name=self.objective_name, **asdict(self.objective)), **sections)

    def identity(self) -> dict[str, Any]:
        """What makes the run, to be hashed: `as_dict` without what may change and without later defaults."""
        kept = {key: value for key, value in self.as_dict().items() if key not in MAY_CHANGE}
        return {key: _without_later(key, part) if key in SECTIONS else part for key, part in kept.items()}

    def add_dataset_info(self, info: dict[str, Any]) -> None:
        """Fill in what is known of the data set, wherever recipe and command line are silent or say null."""
        for key, value in info.items():
            if getattr(self.data, key) is None:
                setattr(self.data, key, value)

    def learning_rate(self) -> tuple[float, str]:
        """The resolved peak learning rate, and the arithmetic that made it.

        Raises UserError if the rate at the end is above it.
        """
        o, b = self.optim, self.train.batch_size
        scale = {"absolute": 1.0, "B/256": b / 256, "B/512": b / 512, "sqrt(B/1024)": math.sqrt(b / 1024)}[o.lr_rule]
        rule = "absolute" if o.lr_rule == "absolute" else f"{o.lr:g} · {o.lr_rule} with B = {b}"
        peak = o.lr * scale
        if o.min_lr > peak:
            raise UserError(
                f"optim.min_lr={o.min_lr:g}, the learning rate at the end, is above its peak, {peak:.3g} ({rule}): "
                "lower it, or raise optim.lr."
            )
        return peak, rule

    def frozen_steps(self, labelled: bool) -> int:
        """How many of the steps, once their number is resolved, leave the backbone as it is.

        labelled: whether the objective needs labels, as fine-tuning does.
        """
        fraction = self.train.freeze_backbone_fraction
        if fraction is None:
            fraction = FREEZE if self.backbone.init_from and not labelled else 0.0
        return round(fraction * known(self.train.steps))

    def run_name(self) -> str:
        """RECIPE-DATA[-HASH]-sSEED."""
        parts = [self.name, short(self.data.name)] + ([self.tag] if self.tag else []) + [f"s{self.train.seed}"]
        return "-".join(parts)


def short(data: str) -> str:
    """A data set's name in the names of files and rows: the last part of a path, or owner-name."""
    is_path = data.startswith(("/", ".", "~")) or Path(data).exists()
    return Path(data).resolve().name if is_path else data.replace("/", "-")


class _File(NamedTuple):
    """A recipe's file, or a run's recipe.yaml."""

    path: Path
    values: dict[str, Any]  # by section.key
    run: str | None = None  # the name of the run's recipe
    images: int = 0  # that the run was trained on

    @property
    def telling(self) -> dict[str, Any]:
        """The values without later defaults."""
        return {key: value for key, value in self.values.items() if not _later_default(key, value)}


def read(recipe: str, overrides: list[str], data: str | None, schema: Callable[[str], type[Any]]) -> Recipe:
    """The recipe called `recipe` (a name in recipes/ or a file) with `key=value` overrides, checked.

    The file may be a run's recipe.yaml: the recipe then has the settings of the run, and its name. schema: the Config
    dataclass of an objective, by the objective's name.
    Raises UserError with all mistakes at once, naming the keys, where they came from and the nearest valid names.
    """
    mistakes = Mistakes()
    changes = _changes(overrides, data, mistakes)
    try:
        file = _open(find(recipe))
    except UserError as error:
        raise UserError(*mistakes.sentences, *error.sentences) from None
    values = _merge(file, changes)
    objective: dict[str, type[Any]] = {}  # stays empty for an unknown objective: its settings are not checked then
    name, source = values.pop("objective.name", (None, str(file.path)))
    with mistakes:
        objective = _objective(file, name, source, schema)
    sections = SECTIONS | objective
    given = _check_all(values, sections, values.keys() if file.run is None else changes.keys(), mistakes)

    unread = {text.partition("=")[0] for text in overrides} - changes.keys()
    faulty = {key.partition(".")[0] for key in unread | values.keys() - given.keys()}
    built = {}
    for section, cls in sections.items():
        if section not in faulty:
            with mistakes:
                built[section] = _build(section, cls, given)
    for section, config in built.items():
        mistakes.sentences += _unread(section, config, given, file)
    mistakes.refuse()

    telling = changes if file.run is None else file.telling | changes  # the settings that change the recipe's run
    tag = _tag({key: given[key][0] if key in given else value for key, value in telling.items()})
    return Recipe(file.run or file.path.stem, name, tag=tag, given=given, **built)


def _changes(overrides: list[str], data: str | None, mistakes: Mistakes) -> dict[str, Any]:
    """The values of the command line, by key."""
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        with mistakes:
            if not equals:
                raise UserError(f"{text!r} is not a setting: write key=value, as in train.epochs=20.")
            try:
                changes[key] = yaml.safe_load(value)
            except (ValueError, yaml.YAMLError):
                raise UserError(f"The value of {key}={value} cannot be read; quote it like a YAML value.") from None
    if data is not None:
        changes["data.name"] = data
    return changes


def _objective(file: _File, name: Any, source: str, schema: Callable[[str], type[Any]]) -> dict[str, type[Any]]:
    """{"objective": its Config}. Raises UserError if there is none of that name, or the recipe is made for another."""
    if not isinstance(name, str):
        raise UserError(f"objective.name is missing in {source}.")
    config = schema(name)
    own = file.values.get("objective.name", name)
    if own != name:
        raise UserError(
            f"{file.path.name} is a recipe for the objective {own}, not {name}: use a recipe for {name} instead "
            f"({', '.join(recipes_of(name)) or 'a file of your own'})."
        )
    return dict(objective=config)


def _check_all(
    values: dict[str, tuple[Any, str]], sections: dict[str, type[Any]], by_hand: Collection[str], mistakes: Mistakes
) -> dict[str, tuple[Any, str]]:
    """The values in the types of their settings, without those that are wrong or whose objective is unknown."""
    known = {key: found for section, cls in sections.items() for key, found in settings_of(section, cls).items()}
    checked = {}
    for key, (value, source) in values.items():
        if "objective" in sections or not key.startswith("objective."):
            with mistakes:
                checked[key] = _check(known, key, value, source, key in by_hand), source
    return checked


def _check(known: dict[str, Setting], key: str, value: Any, source: str, by_hand: bool) -> Any:
    """The value of a setting in its type, or a UserError. by_hand: the value is not from a run's recipe.yaml."""
    if key not in known:
        same = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]  # the section is wrong or left out
        hint = f" Did you mean {same[0]!r}?" if same else nearest(key, [*known, "objective.name"])
        if not by_hand:
            hint = " Another version of this code made the run."
        raise UserError(f"Unknown key {key!r} in {source}.{hint}")
    checked = known[key].check(value, source)
    if key == "data.subset" and by_hand and isinstance(value, float) and value >= 1:
        raise UserError(
            f"data.subset={value} in {source} has a decimal point: leave it null for all images, write a fraction "
            "below 1 of each class, or a whole number without a decimal point for that many images of each class."
        )
    return checked


def read_settings(path: Path) -> dict[str, Any]:
    """What a run's recipe.yaml holds. Raises UserError if it cannot be read."""
    tree = _load(path)
    if not isinstance(tree, dict):
        raise UserError(f"{path} does not hold the settings of a run.")
    return tree


class _Once(yaml.SafeLoader):
    """Refuses a key that is written twice in one section, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                at = f"in lines {lines[key.value]} and {key.start_mark.line + 1}"
                raise yaml.YAMLError(f"{key.value} is written twice, {at}")
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _load(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Once) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not text, or a date that no calendar has
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def _build(section: str, cls: type[Any], given: dict[str, tuple[Any, str]]) -> Any:
    """A section with the values given, and defaults for the rest. Raises UserError if they contradict each other."""
    settings = settings_of(section, cls)
    absent = [s for key, s in settings.items() if s.default is MISSING and key not in given]
    if absent:
        raise UserError(*(f"{s.key} is missing: {s.help}." for s in absent))
    built = cls(**{key.partition(".")[2]: given[key][0] for key in settings if key in given})
    wrong = list(CHECKS[section](built)) if section in CHECKS else []
    if wrong:
        raise UserError(*wrong)
    return built


def _unread(section: str, config: Any, given: dict[str, tuple[Any, str]], file: _File) -> Iterator[str]:
    """What is wrong with settings that are no defaults and that nothing reads, so that two runs would be one: those of
    the command line, and those of a recipe's file in a section that the command line leaves as it is. A run's file
    records all settings.
    """
    own = settings_of(section, type(config))
    changed = any(given[key][1] == COMMAND_LINE for key in own if key in given)
    by_hand = {COMMAND_LINE} if changed or file.run is not None else {str(file.path)}
    for key, one in own.items():
        value, source = given.get(key, (one.default, ""))
        if one.read_if and source in by_hand and value != one.default and not one.read_if.told(config):
            yield f"{key} in {source} is read only where {one.read_if.words}: leave it out."


def _later_default(key: str, value: Any) -> bool:
    """Whether a setting that earlier versions lack has its default."""
    return key in ADDED_LATER and value == flat(defaults())[key]


def _without_later(section: str, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not _later_default(f"{section}.{name}", value)}


def _tag(telling: dict[str, Any]) -> str:
    """A short hash of these settings, each checked, so that one setting has one hash, however it is written."""
    changed = {
        k: v for k, v in telling.items() if k != "train.seed" and k != "data.name" and k.split(".")[0] not in MAY_CHANGE
    }
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6] if changed else ""


def _open(path: Path) -> _File:
    """A recipe's file or a run's recipe.yaml. Raises UserError for any other file."""
    tree = _load(path)
    run, images = None, 0
    if isinstance(tree, dict) and tree.keys() >= ADDED:
        run, images = str(tree["recipe"]), tree["images"]["count"]
        tree = {section: part for section, part in tree.items() if section not in ADDED}
    if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in tree.values()):
        raise UserError(f"{path} must hold sections of settings: {', '.join(SECTIONS)}, objective.")
    values = {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}
    return _File(path, values if run is None else _without_findings(values), run, images)


def _without_findings(values: dict[str, Any]) -> dict[str, Any]:
    """A run's values without those that it recorded, such as the device, which are not settings."""
    known = {f"{section}.{f.name}" for section in MAY_CHANGE for f in fields(SECTIONS[section])}
    return {k: v for k, v in values.items() if k in known or k.split(".")[0] not in MAY_CHANGE}


def _merge(file: _File, changes: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """{key: (value, where it came from)} of a file's values and the command line's, without what the latter replace."""
    own, of_run = file.values, file.run is not None
    outdated: set[str] = set()
    named = {}
    if "backbone.name" in changes:  # the file's shape is that of its own model
        outdated |= {"backbone.embed_dim", "backbone.depth", "backbone.num_heads"}
        named = _patch_in(changes["backbone.name"])
        outdated |= named.keys()
    if of_run and changes.get("data.name", own.get("data.name")) != own.get("data.name"):
        outdated |= set(OF_IMAGES)
    if of_run and any(length in changes for length in LENGTHS):  # the steps there may be resolved from epochs or FLOPs
        outdated |= set(LENGTHS)
    if of_run and _counted(file) and any(own.get(key, value) != value for key, value in _counting(changes).items()):
        outdated.add("train.steps")
    asked = [place for place, length in enumerate(LENGTHS) if changes.get(length) is not None]
    outdated |= set(LENGTHS[max(asked) + 1 :] if asked else ())  # what would win over the command line's
    own = _patch_in(own.get("backbone.name") if "backbone.name" not in changes else None) | own
    kept = {key: (value, str(file.path)) for key, value in own.items() if key not in outdated}
    told = {key: (value, BACKBONE_NAME) for key, value in named.items()}
    return kept | told | {key: (value, COMMAND_LINE) for key, value in changes.items()}


def _counted(file: _File) -> bool:
    """Whether a run's steps are what its epochs came to."""
    own = file.values
    if own.get("train.epochs") is None or own.get("train.flops") is not None:
        return False
    return bool(own["train.steps"] == steps_in(own["train.epochs"], file.images, own["train.batch_size"]))


def steps_in(epochs: float, images: int, batch_size: int) -> int:
    """The optimizer steps of so many passes over the images."""
    return math.ceil(round(epochs * images / batch_size, 9))  # in binary, 1.1 · 100 is a little above 110


def _counting(changes: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that decide how many steps an epoch has, beside which images have labels."""
    keys = ("train.batch_size", "data.name", "data.train_split", "data.subset", "data.hold_out", "data.skip_broken")
    return {key: changes[key] for key in keys if key in changes}


def _patch_in(name: Any) -> dict[str, int]:
    """The setting that a model's name states, as vit_base_patch16_224 does; our default must not override it."""
    found = re.search(r"_patch(\d+)", str(name))
    return {"backbone.patch_size": int(found[1])} if found else {}


def recipes_of(objective: str) -> list[str]:
    """The names of the shipped recipes of an objective."""
    return [p.stem for p in shipped() if _open(p).values.get("objective.name") == objective]


def shipped() -> list[Path]:
    """The files of the shipped recipes."""
    return sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)


def find(recipe: str) -> Path:
    """The file of a recipe given by name or path. Raises UserError with the names there are."""
    for path in (RECIPES / f"{recipe}.yaml", Path(recipe)):
        if path.is_file():
            return path
    names = sorted(
        str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml") if p.parent.name != "study"
    )
    raise UserError(f"There is no recipe {recipe!r}.{nearest(recipe, names)} Recipes: {', '.join(names)}.")


def differences(old: dict[str, Any], new: dict[str, Any], config: type[Any] | None = None) -> list[str]:
    """Keys, outside of the sections that may change, whose values differ between two recipes in the form of `as_dict`.

    A setting that the old recipe lacks counts as its default; a resolved value that it lacks does not count, nor does
    the path of the images, if they are the same. config: the objective's Config, for its defaults.
    """
    filled: dict[str, Any] = defaults()
    if config is not None:
        filled["objective"] = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    a, b = flat(filled) | flat(old), flat(new)
    keys = {k for k in a.keys() | b.keys() if k in a or not k.startswith("resolved.")}
    if "images.fingerprint" in a and a["images.fingerprint"] == b.get("images.fingerprint"):
        keys.discard("data.name")
    return sorted(k for k in keys if k.split(".")[0] not in MAY_CHANGE and a.get(k) != b.get(k))


def defaults() -> dict[str, dict[str, Any]]:
    """{section: {key: default}} of all settings but the objective's: what a run counts as having that lacks them."""
    return {name: asdict(cls()) for name, cls in SECTIONS.items()}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of settings, by section.key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _check_train(train: Train) -> Iterator[str]:
    if train.epochs is None and train.steps is None and train.flops is None:
        yield "The recipe sets no budget: give train.epochs, train.steps or train.flops."


def _check_optim(optim: Optim) -> Iterator[str]:
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        yield f"optim.betas must be two numbers in [0, 1), not {optim.betas}."
    if optim.momentum >= 1:
        yield f"optim.momentum must be below 1, not {optim.momentum}."


def _check_data(data: Data) -> Iterator[str]:
    limits, size = data.range, data.img_size
    if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
        yield f"data.range must be two increasing numbers such as [0, 4095], not {limits}."
    if size is not None:
        sides = size if isinstance(size, list) else [size] * 2
        if len(sides) != 2 or any(s < 1 for s in sides):
            yield f"data.img_size must be S or [H, W] in pixels, not {size}."


def _check_views(views: Views) -> Iterator[str]:
    if len(views.scale) != 2 or not 0 < views.scale[0] <= views.scale[1] <= 1:
        yield f"views.scale must be two increasing fractions such as [0.2, 1], not {views.scale}."


# what is wrong with values that each have the right type, by section
CHECKS: dict[str, Callable[[Any], Iterator[str]]] = dict(
    train=_check_train, optim=_check_optim, data=_check_data, views=_check_views
)
