"""Files and folders of weights → tensors by name. Only safetensors and `weights_only` files are read: no pickle ever
runs."""

import argparse
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ssl_vit.errors import UserError, listed

# what training codes keep the weights under, in the order of preference; averaged ones first, as timm does
WRAPPERS = ("model_ema", "state_dict_ema", "state_dict", "model", "module")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# words in the names of the two branches of a self-distillation, such as MoCo v3's momentum_encoder and base_encoder
BRANCHES = {"teacher": {"teacher", "momentum"}, "student": {"student", "base"}}
USUAL = {"teacher", "base"}  # what is evaluated, by DINO and by MoCo v3
KINDS = "a .pth, .pt or .bin of PyTorch or a .safetensors"


@dataclass
class Contents:
    """What a file or folder of weights holds.

    wrappers: the keys under which the tensors lay; architecture: of timm, if the file names it; configs: the JSON files
    of a folder by name; dropped: {what was left behind: its keys}.
    """

    where: str
    tensors: dict[str, Tensor]
    wrappers: list[str] = field(default_factory=list)
    prefix: str = ""
    architecture: str | None = None
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, pattern: str, what: str) -> None:
        """Leave behind the tensors whose whole name matches."""
        names = [name for name in self.tensors if re.fullmatch(pattern, name)]
        for name in names:
            del self.tensors[name]
        if names:
            self.dropped.setdefault(what, []).extend(names)


def read(path: Path, take: str | None = None) -> Contents:
    """The weights in a file, or in a folder of Hugging Face's or OpenCLIP's. take: "teacher" (default) or "student".

    Raises UserError, with the remedy, for a file that holds none.
    """
    if not path.is_dir():
        return _unwrap(_open(path), path, take)
    configs = {file.name: _json(file) for file in sorted(path.glob("*.json")) if file.name in CONFIGS}
    tree: dict[str, Any] = {}
    for file in _files(path, configs):
        tree |= _open(file)
    contents = _unwrap(tree, path, take)
    contents.configs = configs
    return contents


CONFIGS = ("config.json", "preprocessor_config.json", "open_clip_config.json", "adapter_config.json")


def _files(folder: Path, configs: dict[str, Any]) -> list[Path]:
    """The files of a folder's weights; several where they are sharded."""
    if "adapter_config.json" in configs:
        raise _adapters(folder)
    found = [folder / name for name in names(folder)]
    if not found:
        raise UserError(f"{folder} holds no {listed(list(WEIGHTS)).replace(' and ', ' or ')}: pass {KINDS} file.")
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise UserError(f"{folder} lacks {listed(missing)}, which its index names: fetch the whole folder.")
    return found


def names(folder: Path) -> list[str]:
    """The names of the files of a folder's weights: those of its index, if they are sharded, or one, if there is."""
    index = next(iter(sorted(folder.glob("*.index.json"))), None)
    if index is not None:
        return sorted(set(_json(index).get("weight_map", {}).values()))
    return [name for name in WEIGHTS if (folder / name).is_file()][:1]


def config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; {} if there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def has_config(folder: Path) -> bool:
    """Whether a folder of timm's, transformers' or OpenCLIP's tells what its weights are."""
    return bool({"architecture", "model_type"} & config(folder).keys()) or (folder / "open_clip_config.json").exists()


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}): fetch the folder again.") from None
    return found if isinstance(found, dict) else {}


def _open(path: Path) -> Any:
    """What a file holds: a dict of tensors, or of dicts of them."""
    with open(path, "rb") as stream:
        head = stream.read(512)
    if not head:
        raise UserError(f"{path} is empty: fetch or copy it again.")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS and not the weights: run git lfs pull.")
    if re.fullmatch(rb"[\t\n\r -~]+", head):
        raise UserError(f"{path} is a text and no weights: pass {KINDS} file.")
    damaged = UserError(f"{path} is damaged or not whole: fetch or copy it again.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            raise damaged from None
    if not head.startswith((b"PK", b"\x80")):
        raise UserError(f"{path} is no file of PyTorch: pass {KINDS} file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in which training codes keep their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise damaged from None
        raise _pickled(path) from None
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program and no plain weights: in Python, "
                f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth') writes them."
            ) from None
        raise damaged from None
    except (EOFError, OSError, ValueError, KeyError):
        raise damaged from None


def _pickled(path: Path) -> UserError:
    """The error for a file whose reading could run any code."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # whatever else its reader meets in a file that is refused anyway
        names = []
    what = f" ({', '.join(sorted(names)[:3])})" if names else ""
    return UserError(
        f"{path} is a pickle of Python objects{what}, and reading it could run any code: if you trust it, run "
        f"torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), 'weights.pth') where its code is "
        "installed (if it holds a dict, on the module or state dict in it), and pass weights.pth."
    )


def _adapters(where: Path) -> UserError:
    return UserError(
        f"{where} holds LoRA adapters without the weights that they change: merge them (in peft, "
        "model.merge_and_unload().save_pretrained(FOLDER)) and pass that folder."
    )


def _unwrap(tree: Any, path: Path, take: str | None) -> Contents:
    """The tensors of the one model in what a file held."""
    wrappers: list[str] = []
    architecture = None
    while isinstance(tree, dict):
        if isinstance(tree.get("arch"), str):
            architecture = tree["arch"]
        order = (take, *WRAPPERS) if take else ("teacher", "student", *WRAPPERS)
        inside = next((key for key in order if isinstance(tree.get(key), dict)), None)
        if inside is None:
            break
        tree = tree[inside]
        wrappers.append(inside)
    tensors = {k: v for k, v in tree.items() if isinstance(v, Tensor)} if isinstance(tree, dict) else {}
    if any("lora_" in name for name in tensors):
        raise _adapters(path)
    if not tensors:
        keys = {str(key) for key in tree} if isinstance(tree, dict) else set()
        if {"param_groups", "optimizer"} & keys:
            raise UserError(
                f"{path} holds the state of an optimizer and no weights: pass the file of the model, which training "
                "codes save beside it."
            )
        raise UserError(f"{path} holds no weights by name: pass the state dict of a model.")
    contents = Contents(str(path), tensors, wrappers, architecture=architecture)
    _strip(contents, take)
    return contents


def _words(prefix: str) -> set[str]:
    return set(re.split(r"[._]", prefix))


def _branches(prefixes: list[str]) -> dict[str, list[str]]:
    """The prefixes of the teacher and of the student. What is beside a teacher is the student, as `backbone.` beside
    solo-learn's `momentum_backbone.` and lightly's `backbone_momentum.`."""
    found = {branch: [p for p in prefixes if _words(p) & words] for branch, words in BRANCHES.items()}
    if found["teacher"] and not found["student"]:
        found["student"] = [prefix for prefix in prefixes if prefix not in found["teacher"]]
    return found


def _strip(contents: Contents, take: str | None) -> None:
    """Take away what stands before the names of the backbone, such as `module.backbone.`; others are left behind."""
    for wrapper in ("module.", "_orig_mod.", "module."):  # of DDP and torch.compile, one within the other
        if all(name.startswith(wrapper) for name in contents.tensors):
            contents.tensors = {name.removeprefix(wrapper): value for name, value in contents.tensors.items()}
    end = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(end) for name in contents.tensors if name.endswith(end)]
    branches = _branches(prefixes)
    if take and not branches[take] and take not in contents.wrappers:
        raise UserError(f"{contents.where} holds no {take}: leave out ,take={take}.")
    wanted = (branches[take] if take else [prefix for prefix in prefixes if _words(prefix) & USUAL]) or prefixes
    if len(wanted) > 1:
        remedy = "save the one you want alone"
        if not take and all(branches.values()):
            remedy = "append ,take=teacher or ,take=student"
        raise UserError(f"{contents.where} holds several backbones ({listed(wanted)}): {remedy}.")
    prefix = wanted[0] if wanted else ""
    if prefix:
        others = [name for name in contents.tensors if not name.startswith(prefix)]
        for name in others:
            del contents.tensors[name]
            contents.dropped.setdefault("beside the backbone", []).append(name)
        contents.tensors = {name.removeprefix(prefix): value for name, value in contents.tensors.items()}
        contents.prefix = prefix
