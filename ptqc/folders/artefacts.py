"""Finished pieces of a calibrated run on disk, so that a run which is killed goes on where it was.

The work folder lies beside the output, ".<name>.ptqc-work", and is locked by the run that uses it. Each piece is one
safetensors file: its quantized weights as their parts, its changed float parameters, and in the header

    key      hash of everything the piece was made from: the request, the graph, and the piece before it
    digest   hash of its tensors
    said     what the engine's report says of the piece, so that the one of a resumed run lacks nothing

Files are written under another name and renamed. One that is broken, or has another key, is as if it were not there.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ptqc.errors import CheckpointError
from ptqc.folders.flatten import flatten_state_dict, unflatten_state_dict
from ptqc.folders.manifest import Manifest
from ptqc.folders.safefile import SafeFile, TensorEntry, read_safefile
from ptqc.folders.shards import TensorWriter
from ptqc.folders.staging import unwritable
from ptqc.scratch import hold

__all__ = ["Artefact", "WorkFolder", "work_folder_of"]

log = logging.getLogger("ptqc")

_RECORD = "finished.json"


def work_folder_of(target: Path) -> Path:
    """Where finished pieces of a run that writes `target` are kept."""
    return target.with_name(f".{target.name}.ptqc-work")


@dataclass(frozen=True)
class Artefact:
    """A finished piece. digest: of its tensors. said: of it, in plain values."""

    file: SafeFile
    digest: str
    said: Mapping[str, Any]

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Where each tensor lies, by its name in a checkpoint."""
        return self.file.entries

    @property
    def manifest(self) -> Manifest:
        """Its quantized weights."""
        return Manifest.from_config(json.loads(self.file.metadata["ptqc"]), str(self.file.path))

    def state(self) -> dict[str, Tensor]:
        """Its quantized weights and float parameters by name."""
        return unflatten_state_dict({name: entry.read() for name, entry in self.entries.items()}, self.file.metadata)


class WorkFolder:
    """The folder that holds artefacts, locked while the context lasts.

    base: hash of the request. With another one nothing in the folder is used.
    """

    def __init__(self, path: Path, base: str) -> None:
        self.path, self.base = path, base
        self._lock: int | None = None

    def __enter__(self) -> "WorkFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.path)
        except OSError as error:
            raise unwritable(self.path, error) from None
        if self._lock is None:
            raise CheckpointError(
                f"{self.path} is in use by another run for the same output; wait for it, or write somewhere else"
            )
        for left in self.path.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)  # values between pieces, of a run that died
            elif left.suffix == ".tmp":
                left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record(self, fields: Mapping[str, Any]) -> None:
        """Note that the output is complete, in plain values that `recorded` gives back."""
        temporary = self.path / f"{_RECORD}.tmp"
        temporary.write_text(json.dumps(fields), encoding="utf-8")
        os.replace(temporary, self.path / _RECORD)

    @staticmethod
    def recorded(path: Path) -> dict[str, Any] | None:
        """What `record` has noted in the folder `path`; None if there is nothing, or nothing that can be read."""
        try:
            fields = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return fields if isinstance(fields, dict) else None

    def remove(self) -> None:
        """Remove the folder with everything in it, the record last: whoever finds it finds a complete output."""
        for left in self.path.iterdir():
            if left.name != _RECORD:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def key(self, index: int, before: str, parts: Iterable[str]) -> str:
        """The key of a piece. before: digest of the last one with an artefact. parts: what else it is made from."""
        return _hashed([self.base, str(index), before, *parts])

    def read(self, index: int, key: str) -> Artefact | None:
        """A finished piece; None if there is none of that key, or its file is broken."""
        path = self._path(index)
        if not path.exists():
            return None
        try:
            file = read_safefile(path)
            artefact = Artefact(file, file.metadata["digest"], json.loads(file.metadata["said"]))
            is_same = file.metadata.get("key") == key
            if is_same and _digest_of_file(file) == artefact.digest:
                artefact.manifest.check({name: (e.shape, e.dtype) for name, e in file.entries.items()}, str(path))
                return artefact
            log.info("%s is %s; the piece is made again", path, "damaged" if is_same else "of another run")
        except (CheckpointError, KeyError, ValueError) as error:
            log.info("%s cannot be used (%s); the piece is made again", path, error)
        return None

    def write(self, index: int, key: str, state: Mapping[str, Tensor], said: Mapping[str, Any]) -> Artefact:
        """Keep a finished piece: quantized weights and float parameters by name, and what was said of it.

        Raises: CheckpointError if the disk is full, or cannot be written; finished pieces are kept.
        """
        tensors, metadata = flatten_state_dict(state)
        digest = _digest(tensors)
        path = self._path(index)
        temporary = path.with_suffix(".tmp")
        layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        try:
            header = metadata | {"key": key, "digest": digest, "said": json.dumps(said)}
            with TensorWriter(temporary, layout, header) as writer:
                for name, tensor in tensors.items():
                    writer.append(name, tensor)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            text = str(unwritable(self.path, error))
            raise CheckpointError(f"{text}; what is finished is kept there, run the same again to go on") from None
        return Artefact(read_safefile(path), digest, said)

    def _path(self, index: int) -> Path:
        return self.path / f"piece-{index:05d}.safetensors"


def _hashed(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(_heading(name, tuple(tensor.shape), tensor.dtype))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_file(file: SafeFile) -> str:
    digest = hashlib.sha256()
    for name in sorted(file.entries):
        entry = file.entries[name]
        digest.update(_heading(name, entry.shape, entry.dtype))
        for piece in entry.pieces():
            digest.update(piece.numpy().data)
    return digest.hexdigest()


def _heading(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    return json.dumps([name, list(shape), str(dtype)]).encode()
