"""A recipe: every setting of a run, merged, checked and resolved. Knows nothing of torch modules.

Precedence: defaults < data facts < recipe file < command line (`key=value`). An unknown key, a wrong type or an
impossible value is refused before anything loads.
"""

import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from ssl_vit.errors import UserError, nearest

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def setting(
    default: Any, help: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
):
    """A dataclass field with its meaning and its bounds."""
    metadata = dict(help=help, above=above, at_least=at_least, at_most=at_most)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Train:
    epochs: float | None = setting(None, "passes over the images; `steps` and `flops` win over it", above=0)
    steps: int | None = setting(None, "optimizer steps; 0 saves the random initialisation", at_least=0)
    flops: float | None = setting(None, "training budget in FLOPs, counted", above=0)
    batch_size: int = setting(256, "images per optimizer step, over all processes", at_least=1)
    seed: int = setting(0, "addresses every random draw of the run", at_least=0)
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: bf16 on CUDA >= 8.0, else fp32")


@dataclass
class Optim:
    lr: float = setting(1e-3, "peak learning rate before `lr_rule`", above=0)
    lr_rule: Literal["absolute", "B/256", "B/512", "sqrt(B/1024)"] = setting(
        "absolute", "what `lr` is multiplied with; B is the global batch"
    )
    min_lr: float = setting(0.0, "learning rate at the end of the cosine, not multiplied", at_least=0)
    warmup_fraction: float = setting(0.05, "fraction of the steps with linear warm-up", at_least=0, at_most=1)
    betas: list[float] = setting([0.9, 0.95], "AdamW's")
    weight_decay: float = setting(0.05, "AdamW's, decoupled, multiplied by the learning rate", at_least=0)
    weight_decay_end: float | None = setting(None, "end of a cosine that starts at `weight_decay`", at_least=0)
    no_weight_decay: Literal["1d", "1d+tokens"] = setting(
        "1d",
        "what is not decayed: biases and norms, or also positions and tokens (class, distillation, register, mask)",
    )
    layer_decay: float = setting(1.0, "learning rate of each block relative to the next", above=0, at_most=1)
    clip_grad: float | None = setting(None, "largest gradient norm", above=0)
    clip_mode: Literal["global", "parameter"] = setting("global", "one norm for all, or (DINO) one per parameter")


@dataclass
class Data:
    name: str = setting("digits", "a known name, a path, or owner/name on the Hugging Face hub")
    config: str | None = setting(None, "the configuration of a set that has several")
    image_column: str | None = setting(None, "the column that holds the images")
    label_column: str | None = setting(None, "the column that holds the labels")
    train_split: str | None = setting(None, "the split to train on")
    report_split: str | None = setting(None, "the split whose figures are reported")
    subset: float | None = setting(
        None, "train on a part of the images: below 1 a fraction of each class, else so many of each class", above=0
    )
    subset_seed: int = setting(0, "which images that part holds; the parts of one seed are nested", at_least=0)
    hold_out: bool = setting(False, "leave out a tenth of the training images, to choose settings on")
    img_size: int | list[int] | None = setting(
        None, "training resolution, S or [H, W]; the images' own if they share one"
    )
    in_chans: int | None = setting(None, "1 grey, 3 RGB, others as stored", at_least=1)
    mean: list[float] | None = setting(None, "per channel, in [0, 1]")
    std: list[float] | None = setting(None, "per channel, in [0, 1]")
    hflip: bool | None = setting(None, "whether a horizontal flip keeps the label")
    range: list[float] | None = setting(
        None, "[black, white] of images deeper than 8 bits; of the training set: its bits, or [0, 1], or its values"
    )
    background: Literal["white", "black"] = setting("white", "what images with alpha are laid on; channels=4 keeps it")
    layout: Literal["hwc", "chw"] | None = setting(None, "axes of stored arrays, where their shape does not tell")
    pages: Literal["first", "channels"] | None = setting(
        None, "of files with several pages or frames take the first, or all as channels; null: refused"
    )
    cache_gb: float = setting(4.0, "decode once and keep in memory if the images share one size and fit", at_least=0)
    skip_broken: bool = setting(False, "leave out images that cannot be decoded, and count them")


@dataclass
class Views:
    augmentation: Literal["none", "crop+flip", "dino", "three-augment"] = setting(
        "crop+flip", "augmentation: none, crop and flip, DINO's colours on top, or DeiT III's 3-Augment"
    )
    scale: list[float] = setting([0.2, 1.0], "area of the random crop, as a fraction of the image")
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear", "of crops, and of the evaluation view of the backbone; both antialiased"
    )
    blur: bool = setting(True, "blur in dino; its sigma, up to 2 px, is meant for 224 px")


@dataclass
class Backbone:
    name: str = setting(
        "vit_tiny",
        "vit_{tiny,small,base,large,huge}, or any timm model; on the command line it replaces the recipe's width, "
        "depth and heads, and its patch if the name has one, as in vit_base_patch16_224",
    )
    embed_dim: int | None = setting(None, "token dimension, instead of the name's", at_least=1)
    depth: int | None = setting(None, "number of blocks", at_least=1)
    num_heads: int | None = setting(None, "number of attention heads", at_least=1)
    patch_size: int | Literal["auto"] | None = setting("auto", "patch side; auto: size/8 up to 64 px", at_least=1)
    pos_embed: Literal["learned", "sincos"] = setting("learned", "position embedding; sincos is fixed")
    weight_init: Literal["trunc_normal", "xavier"] = setting(
        "trunc_normal", "initial linear weights: timm's and DINO's, or MAE's"
    )
    reg_tokens: int | None = setting(None, "number of register tokens; null: as the name says", at_least=0)
    init_values: float | None = setting(None, "initial layer scale", above=0)
    drop_path_rate: float = setting(0.0, "stochastic depth rate of the last block", at_least=0, at_most=0.99)
    init_from: str | None = setting(None, "start from this run, timm folder or timm model")


@dataclass
class Monitor:
    log_every: int = setting(10, "steps between lines of log.jsonl", at_least=1)
    knn_every: int = setting(0, "steps between k-NN trials on a slice of train; 0: never", at_least=0)
    trackers: str = setting("auto", "auto: TensorBoard if installed; none; or names that Accelerate knows, a+b")


@dataclass
class Runtime:
    per_device_batch_size: int | Literal["auto"] = setting("auto", "images at a time on one device", at_least=1)
    num_workers: int | Literal["auto"] = setting(
        "auto", "decoding processes, for images that do not fit the cache", at_least=0
    )
    num_threads: int | Literal["auto"] = setting("auto", "CPU threads; auto: cores / local processes", at_least=1)
    save_every: int = setting(500, "steps between checkpoints; the last one is kept", at_least=1)
    save_minutes: float | None = setting(10.0, "minutes between checkpoints, whichever comes first", above=0)
    keep_every: int = setting(0, "steps between backbones that are kept, for the evaluators; 0: the last", at_least=0)
    compile: bool = setting(False, "torch.compile the transformer blocks")


SECTIONS = dict(train=Train, optim=Optim, data=Data, views=Views, backbone=Backbone, monitor=Monitor, runtime=Runtime)
MAY_CHANGE = ("runtime", "monitor")  # sections that may differ when a run goes on
ADDED = {"recipe", "resolved", "images"}  # what a run's recipe.yaml holds beside its settings
OF_IMAGES = (  # what is of one set of images, or was resolved from them
    *("data.img_size", "data.in_chans", "data.mean", "data.std", "data.hflip", "data.range", "backbone.patch_size"),
    *("data.config", "data.image_column", "data.label_column", "data.train_split", "data.report_split"),
)
LENGTHS = ("train.epochs", "train.steps", "train.flops")


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

    def as_dict(self) -> dict:
        """The settings as nested plain values, in the form of a recipe file."""
        sections = {name: asdict(getattr(self, name)) for name in SECTIONS}
        return dict(recipe=self.name, objective=dict(name=self.objective_name, **asdict(self.objective)), **sections)

    def add_dataset_info(self, facts: dict[str, Any]) -> None:
        """Fill in what the data say of themselves, wherever recipe and command line are silent or say null."""
        for key, value in facts.items():
            if getattr(self.data, key) is None:
                setattr(self.data, key, value)

    def learning_rate(self) -> tuple[float, str]:
        """The resolved peak learning rate, and the arithmetic that made it."""
        o, b = self.optim, self.train.batch_size
        scale = {"absolute": 1.0, "B/256": b / 256, "B/512": b / 512, "sqrt(B/1024)": math.sqrt(b / 1024)}[o.lr_rule]
        rule = "absolute" if o.lr_rule == "absolute" else f"{o.lr:g} · {o.lr_rule} with B = {b}"
        return o.lr * scale, rule

    def run_name(self) -> str:
        """RECIPE-DATA[-HASH]-sSEED."""
        parts = [self.name, short(self.data.name)] + ([self.tag] if self.tag else []) + [f"s{self.train.seed}"]
        return "-".join(parts)


def short(data: str) -> str:
    """The name of images in names of files and rows: a path's last part, or owner-name."""
    is_path = data.startswith(("/", ".", "~")) or Path(data).exists()
    return Path(data).resolve().name if is_path else data.replace("/", "-")


def read(recipe: str, overrides: list[str], data: str | None, schema: Callable[[str], type]) -> Recipe:
    """The recipe called `recipe` (a name in recipes/ or a file) with `key=value` overrides, checked.

    The file may be a run's recipe.yaml: the recipe then has the settings of the run, and its name. schema: the Config
    dataclass of an objective, by the objective's name.
    Raises UserError, naming the key, where it came from and the nearest valid name.
    """
    path = find(recipe)
    own, run = _open(path)
    changes = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not a setting: write key=value, as in train.epochs=20.")
        try:
            changes[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise UserError(f"The value of {key}={value} cannot be read; quote it like a YAML value.") from None
    if data is not None:
        changes["data.name"] = data
    values = _merge(own, changes, str(path), run is not None)

    name, source = values.pop("objective.name", (None, str(path)))
    if not isinstance(name, str):
        raise UserError(f"objective.name is missing in {source}.")
    sections = SECTIONS | dict(objective=schema(name))
    if own.get("objective.name", name) != name:
        raise UserError(
            f"{path.name} is a recipe of the objective {own['objective.name']}, not {name}: name one of {name} instead "
            f"({', '.join(_recipes_of(name)) or 'a file of your own'})."
        )
    known = [f"{s}.{f.name}" for s, cls in sections.items() for f in fields(cls)] + ["objective.name"]
    parts: dict[str, dict] = {section: {} for section in sections}
    telling = changes if run is None else own | changes  # what makes it another run than the plain one of its recipe
    for key, (value, source) in values.items():
        by_hand = run is None or key in changes
        if key not in known:
            same = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]  # the section is wrong or left out
            hint = f" Did you mean {same[0]!r}?" if same else nearest(key, known)
            if not by_hand:
                hint = " Another version of this code made the run."
            raise UserError(f"Unknown key {key!r} in {source}.{hint}")
        section, _, leaf = key.partition(".")
        parts[section][leaf] = _checked(sections[section], key, leaf, value, source)
        if key == "data.subset" and by_hand and isinstance(value, float) and value >= 1:
            raise UserError(
                f"data.subset={value} in {source} has a point: leave it null for all images, write a fraction below 1 "
                "for a part of each class, or a whole number, without a point, for so many of each class."
            )
        if key in telling:
            telling[key] = parts[section][leaf]  # one setting has one hash, however it is written
    changed = {
        k: v for k, v in telling.items() if k != "train.seed" and k != "data.name" and k.split(".")[0] not in MAY_CHANGE
    }
    tag = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6] if changed else ""
    built = {section: cls(**parts[section]) for section, cls in sections.items()}
    result = Recipe(name=run or path.stem, objective_name=name, tag=tag, **built)
    _check_together(result)
    return result


def _open(path: Path) -> tuple[dict[str, Any], str | None]:
    """(the values of a recipe's file by section.key, None), or of a run's recipe.yaml (those, the recipe's name)."""
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not text, or a date that no calendar has
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    run = None
    if isinstance(tree, dict) and tree.keys() >= ADDED:
        run = str(tree["recipe"])
        tree = {section: part for section, part in tree.items() if section not in ADDED}
    if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in tree.values()):
        raise UserError(f"{path} must hold sections of settings: {', '.join(SECTIONS)}, objective.")
    values = {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}
    if run is not None:  # what it found there, such as the device, is no setting
        known = {f"{section}.{f.name}" for section in MAY_CHANGE for f in fields(SECTIONS[section])}
        values = {k: v for k, v in values.items() if k in known or k.split(".")[0] not in MAY_CHANGE}
    return values, run


def _merge(own: dict[str, Any], changes: dict[str, Any], path: str, of_run: bool) -> dict[str, tuple[Any, str]]:
    """{key: (value, where it came from)} of a file's values and the command line's, without what the latter outdate."""
    outdated: set[str] = set()
    named = {}
    if "backbone.name" in changes:  # the file's shape is that of its own model
        outdated |= {"backbone.embed_dim", "backbone.depth", "backbone.num_heads"}
        named = _patch_in(changes["backbone.name"])
        outdated |= named.keys()
    if of_run and changes.get("data.name", own.get("data.name")) != own.get("data.name"):
        outdated |= set(OF_IMAGES)
    if of_run and any(length in changes for length in LENGTHS):  # the steps there may be made of epochs or FLOPs
        outdated |= set(LENGTHS)
    own = _patch_in(own.get("backbone.name") if "backbone.name" not in changes else None) | own
    kept = {key: (value, path) for key, value in own.items() if key not in outdated}
    return kept | {key: (value, "the command line") for key, value in (named | changes).items()}


def _patch_in(name: Any) -> dict[str, int]:
    """The setting that a model's name states, as vit_base_patch16_224 does; our default must not override it."""
    found = re.search(r"_patch(\d+)", str(name))
    return {"backbone.patch_size": int(found[1])} if found else {}


def _recipes_of(objective: str) -> list[str]:
    """The names of the shipped recipes of an objective."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml") if _open(p)[0].get("objective.name") == objective)


def find(recipe: str) -> Path:
    """The file of a recipe given by name or path. Raises UserError with the names there are."""
    for path in (RECIPES / f"{recipe}.yaml", Path(recipe)):
        if path.is_file():
            return path
    names = sorted(
        str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml") if p.parent.name != "study"
    )
    raise UserError(f"There is no recipe {recipe!r}.{nearest(recipe, names)} Recipes: {', '.join(names)}.")


def differences(old: dict, new: dict, config: type | None = None) -> list[str]:
    """Keys, outside of what may change, whose values differ between two recipes in the form of `as_dict`.

    A setting that the old one does not know yet had its default; what it did not resolve yet does not count. Nor does
    where the images lie, if they are the same. config: of the objective, for its defaults.
    """
    defaults = {name: asdict(cls()) for name, cls in SECTIONS.items()}
    if config is not None:
        defaults["objective"] = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    a, b = flat(defaults) | flat(old), flat(new)
    keys = {k for k in a.keys() | b.keys() if k in a or not k.startswith("resolved.")}
    if "images.fingerprint" in a and a["images.fingerprint"] == b.get("images.fingerprint"):
        keys.discard("data.name")
    return sorted(k for k in keys if k.split(".")[0] not in MAY_CHANGE and a.get(k) != b.get(k))


def describe(sections: dict[str, type]) -> str:
    """A line for every key: its type, default and meaning."""
    lines = []
    for section, cls in sections.items():
        for f in fields(cls):
            default = f.default if f.default is not MISSING else f.default_factory()
            lines.append(f"  {section}.{f.name}={default}  {f.metadata['help']}  ({_type_name(_hints(cls)[f.name])})")
    return "\n".join(lines)


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree of settings, by section.key."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _checked(cls: type, key: str, leaf: str, value: Any, source: str) -> Any:
    kind = _hints(cls)[leaf]
    bounds = next(f for f in fields(cls) if f.name == leaf).metadata
    try:
        value = _coerce(kind, value)
    except (ValueError, OverflowError):
        hint = ""
        if str in (kind, *typing.get_args(kind)) and not isinstance(value, list | dict | types.NoneType):
            hint = f' Quote it: {key}=\'"{value}"\' on the command line, "{value}" in a file.'
        raise UserError(f"{key} in {source} must be {_type_name(kind)}, not {value!r}.{hint}") from None
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        for word, bad in (
            ("finite", not math.isfinite(number)),
            (f"above {bounds['above']}", bounds["above"] is not None and number <= bounds["above"]),
            (f"at least {bounds['at_least']}", bounds["at_least"] is not None and number < bounds["at_least"]),
            (f"at most {bounds['at_most']}", bounds["at_most"] is not None and number > bounds["at_most"]),
        ):
            if bad:
                raise UserError(f"{key} in {source} must be {word}, not {number}.")
    return value


def _coerce(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _coerce(option, value)
            except ValueError:
                pass
        raise ValueError
    if origin is Literal:
        if value in args:
            return value
        raise ValueError
    if origin is list:
        if isinstance(value, list):
            return [_coerce(args[0], v) for v in value]
        raise ValueError
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 reads 1e-4 as a string
    if kind is int and isinstance(value, str | float) and float(value).is_integer():
        return int(float(value))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        raise ValueError
    return value


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in args)
    if origin is Literal:
        return ", ".join(map(str, args[:-1])) + " or " + str(args[-1]) if len(args) > 1 else str(args[0])
    if origin is list:
        return f"a list of {_type_name(args[0])}"
    names = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", type(None): "null"}
    return names[kind]


def _check_together(recipe: Recipe) -> None:
    if len(recipe.views.scale) != 2 or not 0 < recipe.views.scale[0] <= recipe.views.scale[1] <= 1:
        raise UserError(f"views.scale must be two rising fractions such as [0.2, 1], not {recipe.views.scale}.")
    if len(recipe.optim.betas) != 2 or not all(0 <= b < 1 for b in recipe.optim.betas):
        raise UserError(f"optim.betas must be two numbers in [0, 1), not {recipe.optim.betas}.")
    limits = recipe.data.range
    if limits is not None and (len(limits) != 2 or not limits[0] < limits[1]):
        raise UserError(f"data.range must be two rising numbers such as [0, 4095], not {limits}.")
    size = recipe.data.img_size
    sides = size if isinstance(size, list) else [size] * 2
    if size is not None and (len(sides) != 2 or any(s < 1 for s in sides)):
        raise UserError(f"data.img_size must be S or [H, W] in pixels, not {size}.")
    if recipe.train.epochs is None and recipe.train.steps is None and recipe.train.flops is None:
        raise UserError("The recipe sets no budget: give train.epochs, train.steps or train.flops.")
