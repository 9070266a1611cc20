"""Model folders in memory: a config, and a safetensors file that can lie in its header and in its tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
from torch import Tensor

from tests.hostile.damage import damaged_bytes, damaged_json, damaged_tensors

CONFIG, TENSORS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Folder:
    """A sound folder. metadata: of its safetensors file."""

    files: dict[str, bytes]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @staticmethod
    def of(path: Path) -> "Folder":
        """What lies in a folder."""
        files = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
        with safetensors.safe_open(path / TENSORS, "pt") as file:
            metadata = file.metadata() or {}
        return Folder(files, safetensors.torch.load(files[TENSORS]), metadata)

    def damaged(self, rng: Random, config_at: str | None = None) -> dict[str, bytes]:
        """The files, spoilt in one to three ways. config_at: a key of the config that is changed more than others."""
        files = dict(self.files)
        for _ in range(rng.choice((1, 1, 2, 3))):
            _WAYS[rng.choice(tuple(_WAYS))](self, rng, files, config_at)
        return files


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder that may hold them already."""
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _config(folder: Folder, rng: Random, files: dict[str, bytes], at: str | None) -> None:
    try:
        config = json.loads(files.get(CONFIG, b""))
    except (ValueError, RecursionError):  # none, or spoilt before
        return
    place = config
    if isinstance(config, dict) and at in config and rng.random() < 0.9:
        place = config[at] if isinstance(config[at], (dict, list)) and config[at] else config
    damaged_json(rng, place)
    files[CONFIG] = json.dumps(config).encode()


def _tensors(folder: Folder, rng: Random, files: dict[str, bytes], at: str | None) -> None:
    tensors = dict(folder.tensors)
    for _ in range(rng.choice((1, 1, 2))):
        if tensors:
            damaged_tensors(rng, tensors)
    whole = {name: value.clone(memory_format=None).contiguous() for name, value in tensors.items()}
    files[TENSORS] = safetensors.torch.save(whole, folder.metadata)


def _header(folder: Folder, rng: Random, files: dict[str, bytes], at: str | None) -> None:
    """Change the header, and say its true length."""
    data = folder.files[TENSORS]
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    damaged_json(rng, header)
    text = json.dumps(header).encode()
    files[TENSORS] = len(text).to_bytes(8, "little") + text + data[8 + length :]


def _trade(folder: Folder, rng: Random, files: dict[str, bytes], at: str | None) -> None:
    """Give two tensors of as many bytes each other's place, or one another dtype or shape of as many bytes."""
    data = folder.files[TENSORS]
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    rows = [row for name, row in header.items() if name != "__metadata__"]
    one, other = rng.choice(rows), rng.choice(rows)
    if rng.random() < 0.5:
        key = rng.choice(("dtype", "shape", "data_offsets"))
        one[key], other[key] = other[key], one[key]
    else:
        one["shape"] = rng.choice(([*one["shape"], 1], [*reversed(one["shape"])], [1, *one["shape"]]))
    text = json.dumps(header).encode()
    files[TENSORS] = len(text).to_bytes(8, "little") + text + data[8 + length :]


def _bytes(folder: Folder, rng: Random, files: dict[str, bytes], at: str | None) -> None:
    name = rng.choice(sorted(files))
    files[name] = damaged_bytes(rng, files[name], 2000)


_WAYS = {"config": _config, "config too": _config, "tensors": _tensors, "tensors too": _tensors, "header": _header,
         "trade": _trade, "bytes": _bytes}  # fmt: skip
