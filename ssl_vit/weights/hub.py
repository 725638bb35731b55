"""Models on the Hugging Face hub: `hf-hub:owner/name` or `owner/name`, with `@revision` for another than the newest."""

import json
import re
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub import errors

from ssl_vit import hub
from ssl_vit.errors import UserError
from ssl_vit.weights.reading import CONFIGS, WEIGHTS

NAME = re.compile(r"(?:hf-hub:|hf_hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_name(where: str) -> bool:
    """Whether it may be a model on the hub, and is no path."""
    found = NAME.fullmatch(where)
    explicit = where.startswith(("hf-hub:", "hf_hub:"))
    return bool(found) and (explicit or not (Path(where).exists() or Path(where.split("/")[0]).exists()))


def fetch(where: str) -> Path:
    """The folder with a model's configs and weights, fetched unless it is there already.

    Raises UserError if the hub does not have it, or cannot be reached.
    """
    found = NAME.fullmatch(where)
    assert found is not None
    name, revision = found.groups()
    folder = None
    try:
        for file in CONFIGS:
            folder = _file(name, revision, file) or folder
        weights = next((got for file in WEIGHTS if (got := _file(name, revision, file))), None)
        weights = weights or _shards(name, revision)
    except errors.GatedRepoError:
        raise UserError(
            f"{name} is given to those who accept its licence: accept it at {_page(name)}, run hf auth login, and "
            "start again."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"There is no file, folder or timm model {where!r} here, and no model of that name on the Hugging Face "
            "hub: check the name, or run hf auth login if it is private."
        ) from None
    except Exception as error:  # the hub's client raises a dozen types of its own for what is one thing to the user
        raise UserError(
            f"There is no file, folder or timm model {where!r} here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}): check the name and the network, or download the model elsewhere and pass its "
            "folder."
        ) from None
    if weights is None:
        raise UserError(f"{name} on the Hugging Face hub holds none of {', '.join(WEIGHTS)}: take another model.")
    return weights


def _file(name: str, revision: str | None, file: str) -> Path | None:
    """The folder of a file that has been fetched; None if the model has no such file."""
    try:
        offline = not hub.answers()  # else the client would retry for 23 s; what it has fetched before still loads
        path = huggingface_hub.hf_hub_download(name, file, revision=revision, local_files_only=offline)
    except errors.LocalEntryNotFoundError:
        if _known(name):
            return None
        raise
    except errors.EntryNotFoundError:
        return None
    return Path(path).parent


def _shards(name: str, revision: str | None) -> Path | None:
    folder = _file(name, revision, "model.safetensors.index.json")
    if folder is not None:
        table = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        for file in sorted(set(table.values())):
            _file(name, revision, file)
    return folder


def _known(name: str) -> bool:
    """Whether something of the model has been fetched before."""
    return (Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()


def _page(name: str) -> str:
    return f"{huggingface_hub.constants.ENDPOINT}/{name}"
