"""Model folders, as Hugging Face lays them out, read strictly: a config, safetensors files, perhaps an index."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqc.errors import CheckpointError
from ptqc.folders.safefile import Layout, TensorEntry, read_safefile
from ptqc.folders.shards import INDEX_NAME, SINGLE_NAME

__all__ = ["ModelFolder", "copy_companions", "local_folder", "open_folder", "read_json"]

_LARGEST_JSON = 100_000_000
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
)
"""Files beside the weights that a model needs to be used: tokenizer, generation defaults, preprocessing."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: its config, and where each tensor lies."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    @property
    def layout(self) -> Layout:
        """Shape and dtype of every tensor."""
        return {name: (entry.shape, entry.dtype) for name, entry in self.entries.items()}


def local_folder(source: str | os.PathLike[str]) -> Path:
    """The folder itself, or the local copy of a hub repository "organisation/name" (downloaded if need be).

    Raises: CheckpointError if it is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the safetensors files")
    if not _REPOSITORY.fullmatch(str(source)):
        raise CheckpointError(f"{path} does not exist; give a model folder, or a hub repository as organisation/name")
    from huggingface_hub import snapshot_download  # here: only hub names need it

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.safetensors", "*.json", *_COMPANIONS]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{source} is no folder here, and the hub does not give it: {reason}") from None


def open_folder(source: str | os.PathLike[str]) -> ModelFolder:
    """Read the config and the headers of all safetensors files of a model folder; no tensor is read.

    Raises: CheckpointError that names the file at fault.
    """
    path = local_folder(source)
    config = read_json(path / "config.json")
    if (path / SINGLE_NAME).exists() or not (path / INDEX_NAME).exists():
        _refuse_pickles(path)
        return ModelFolder(path, config, read_safefile(path / SINGLE_NAME).entries)
    weight_map = _weight_map(path / INDEX_NAME)
    files = {file: read_safefile(path / file).entries for file in dict.fromkeys(weight_map.values())}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise CheckpointError(f"{path / INDEX_NAME} seeks {name} in {file}, which lacks it; download both again")
    return ModelFolder(path, config, {name: files[file][name] for name, file in weight_map.items()})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: CheckpointError if the file is missing, too large, or holds anything else.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise CheckpointError(f"{path} is larger than {_LARGEST_JSON // 10**6} MB, no sensible config is")
        fields = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give the folder of a Hugging Face model") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give a readable file") from None
    except (ValueError, RecursionError) as error:
        fault = str(error) or type(error).__name__
        raise CheckpointError(f"{path} is no valid JSON ({fault}); download or save it again") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no JSON object; download or save it again")
    return fields


def _refuse_pickles(path: Path) -> None:
    if (path / SINGLE_NAME).exists():
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path / pickles[0]} is a pickle, which may run code when it is opened, and {SINGLE_NAME} is missing; "
            "convert the model with transformers' save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give a folder with safetensors files")


def _weight_map(path: Path) -> Mapping[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download or save it again")
    unnamed = [file for file in weight_map.values() if not isinstance(file, str)]
    for file in unnamed or dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", file):
            raise CheckpointError(f"{path} names the file {file!r}; only safetensors files beside it are opened")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{path} names {file}, which is missing; download it again")
    return weight_map


def copy_companions(source: Path, folder: Path, *, with_code: bool = False) -> None:
    """Copy tokenizer, generation defaults and the like. with_code: also Python files that config.json refers to."""
    patterns: Iterable[str] = (*_COMPANIONS, "*.py") if with_code else _COMPANIONS
    for file in sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()}):
        if file.suffix not in (".safetensors", ".bin"):
            shutil.copyfile(file, folder / file.name)
