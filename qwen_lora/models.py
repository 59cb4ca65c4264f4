"""Where a model's files are: a local folder in diffusers layout, or a Hugging Face id. No torch.

Only the sub-folders that a stage needs are looked at or downloaded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_lora.errors import InputError

if TYPE_CHECKING:
    from qwen_lora.families.base import Family

HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
CONFIG_NAMES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # in each component's folder
WEIGHTLESS = ("scheduler", "tokenizer")


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine."""

    path: Path
    model_id: str  # hub id, or the bare name of a local folder (never an absolute path)
    revision: str | None  # the commit that was resolved; None for a local folder
    family: Family
    transformer_file: Path | None = None  # whose weights stand for the transformer folder's

    def component(self, name: str) -> Path:
        """The sub-folder of a component. Raises InputError if it is absent."""
        folder = self.path / name
        if not folder.is_dir():
            raise InputError(
                f"model {self.model_id} has no folder {name!r}; it needs the diffusers layout"
            )
        return folder

    def weights(self, name: str) -> Path:
        """Where a component's weights are: its folder, or the single file that stands for it."""
        folder = self.component(name)
        file = self.transformer_file if name == "transformer" else None
        return folder if file is None else file

    def config(self, name: str) -> dict[str, Any]:
        """A component's config as a dict. Raises InputError if it is absent or not JSON."""
        return _read_json(self.component(name) / CONFIG_NAMES.get(name, "config.json"))


def resolve_model(
    model: str,
    components: Sequence[str],
    *,
    weights: bool = True,
    transformer_file: Path | None = None,
) -> ModelFolder:
    """Find a model and make sure that `components` are there.

    model: a folder in diffusers layout, or a Hugging Face id, optionally `id@revision`; an existing
    folder wins. Of a hub id only the components' folders are downloaded, by huggingface_hub with
    its own settings (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE); without `weights`, only their configs. A
    transformer_file stands for the weights in the transformer's folder, which may then be absent.
    Raises InputError for whatever the user can put right.
    """
    model = str(model)
    if transformer_file is not None:
        _check_single_file(transformer_file)
    weightless = "transformer" if transformer_file is not None else None
    local = Path(model).expanduser()
    match = HUB_ID.fullmatch(model)
    if local.is_dir():
        path, model_id, revision = local, local.resolve().name, None
    elif local.exists():
        raise InputError(f"model {model} is a file; name a folder in diffusers layout or a hub id")
    elif match is None:
        raise InputError(f"model {model!r}: no such folder, and not a Hugging Face id (owner/name)")
    else:
        model_id = match["id"]
        files = {
            name: DOWNLOADED if weights and name != weightless else ("*.json",)
            for name in components
        }
        path = _download(model_id, match["revision"], files)
        revision = path.name
    found = ModelFolder(path, model_id, revision, _family_of(path, model), transformer_file)
    absent = [name for name in components if not (path / name).is_dir()]
    if absent and revision is not None and (path / "model_index.json").is_file():
        raise InputError(
            f"model {model}: the Hugging Face cache has no {', '.join(absent)} of it; either the "
            "hub could not be reached (HF_HUB_OFFLINE, or no network: run once with it), or the "
            "repository has not the diffusers layout"
        )
    for name in components:
        found.config(name)
        if weights and name not in (*WEIGHTLESS, weightless):
            weight_files(found.component(name))
    return found


def _check_single_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"transformer file {path} does not exist")
    if path.suffix != ".safetensors":
        raise InputError(
            f"transformer file {path} is no .safetensors file; GGUF and pickles are not read"
        )


def _download(model_id: str, revision: str | None, files: Mapping[str, Sequence[str]]) -> Path:
    """The snapshot folder in the hub cache; its name is the commit. files: component -> patterns
    of what to download of it."""
    from huggingface_hub import errors, snapshot_download

    patterns = ["model_index.json"]
    patterns += [f"{name}/{pattern}" for name, wanted in files.items() for pattern in wanted]
    name = model_id + (f"@{revision}" if revision else "")

    def fetch(local: bool) -> Path:
        found = snapshot_download(
            model_id, revision=revision, allow_patterns=patterns, local_files_only=local
        )
        return Path(found)

    try:
        try:
            return fetch(local=False)
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
            # huggingface_hub 1.x asks the hub about a named commit even when all of it is here.
            return fetch(local=True)
    except errors.GatedRepoError:
        reason = "is gated; accept its terms on huggingface.co and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = "is neither a folder here nor a public model on the hub (private: set HF_TOKEN)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            "is neither a folder here nor in the Hugging Face cache, and the hub cannot be reached "
            "(HF_HUB_OFFLINE, or no network)"
        )
    except errors.HFValidationError as error:
        reason = f"is not a valid hub id: {_first_line(error)}"
    except OSError as error:
        reason = f"cannot be downloaded: {_first_line(error)}"
    raise InputError(f"model {name} {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _family_of(path: Path, model: str) -> Family:
    from qwen_lora.families import family_by_class

    for name in ("model_index.json", "transformer/config.json"):
        if (path / name).is_file():
            class_name = _read_json(path / name).get("_class_name")
            if not isinstance(class_name, str):
                raise InputError(
                    f"{path / name} names no `_class_name`; it is not a diffusers model"
                )
            return family_by_class(class_name)
    raise InputError(
        f"model {model} is no diffusers pipeline: it has neither model_index.json nor "
        "transformer/config.json"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; the model folder is incomplete") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object")
    return value


def weight_files(weights: Path) -> list[Path]:
    """The safetensors files of a component, sorted by name. weights: its folder, or one file.

    Raises InputError if there are none, if one that the index names is missing, or if the weights
    come as pickles only.
    """
    if weights.is_file():
        return [weights]
    for name in WEIGHT_NAMES:
        index = weights / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
        if (weights / name).is_file():
            return [weights / name]
    pickled = sorted(path.name for path in weights.glob("*.bin"))
    if pickled:
        raise InputError(
            f"{weights} holds its weights as {pickled[0]} only; this project reads safetensors, "
            "which cannot run code: convert them with save_pretrained"
        )
    raise InputError(f"{weights} has no weights ({' or '.join(WEIGHT_NAMES)})")


def _indexed_files(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}, which is no safetensors file beside it")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent / name} is missing; download the model again")
    return [index.parent / name for name in names]
