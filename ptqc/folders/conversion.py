"""What quantizing a model folder into another takes, whichever way the codes are chosen."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptqc.codegen.exporters import OnProgress
from ptqc.errors import CheckpointError
from ptqc.folders.folder import ModelFolder
from ptqc.folders.manifest import FLOAT_DTYPES, StoredWeight
from ptqc.folders.safefile import TensorEntry
from ptqc.folders.shards import Append, Block
from ptqc.recipe import Recipe
from ptqc.sites import Skipped

__all__ = [
    "SHARE_OF_CODES", "OnProgress", "Request", "StreamReport", "copied", "model_dtype", "refuse_source", "write_config",
]  # fmt: skip


SHARE_OF_CODES = 0.95
"""Of the progress of a calibrated run: what quantizing takes; the rest is writing the output."""


@dataclass(frozen=True)
class StreamReport:
    """What was done.

    weights: the quantized ones by name. skipped: matrices left in float, and why. is_streamed: False if the model had
    to be loaded whole. pieces: how many a calibrated run had, and resumed: those of them that were finished before.
    notes: what fell short in it, a line each.
    """

    weights: Mapping[str, StoredWeight]
    skipped: tuple[Skipped, ...]
    source_bytes: int
    written_bytes: int
    is_streamed: bool
    pieces: int = 0
    resumed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What the caller asked for."""

    recipe: Recipe
    include: tuple[str, ...] | None
    exclude: tuple[str, ...] | None
    on_progress: OnProgress
    overwrite: bool
    max_shard_bytes: float
    trust_remote_code: bool

    @staticmethod
    def of(
        recipe: Recipe,
        *,
        include: Iterable[str] | None,
        exclude: Iterable[str] | None,
        on_progress: OnProgress | None,
        overwrite: bool,
        max_shard_bytes: float,
        trust_remote_code: bool,
    ) -> "Request":
        """The request of a caller who may leave out patterns and progress."""
        return Request(
            recipe=recipe,
            include=None if include is None else tuple(include),
            exclude=None if exclude is None else tuple(exclude),
            on_progress=on_progress or (lambda done, total, name: None),
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            trust_remote_code=trust_remote_code,
        )


def refuse_source(stored: ModelFolder, target: Path) -> None:
    """Refuse a source that is quantized already, or lies in the target.

    Raises: CheckpointError that says which.
    """
    if "quantization_config" in stored.config:
        found = stored.config["quantization_config"]
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(f"{stored.path} is already quantized ({method}); give the folder of the float model")
    origin = stored.path.resolve()
    if target == origin or target in origin.parents:
        raise CheckpointError(f"{target} holds the model to quantize; write to another folder")


def model_dtype(stored: ModelFolder) -> torch.dtype | None:
    """The dtype in which transformers would build the model; None if the config does not say."""
    name = stored.config.get("dtype") or stored.config.get("torch_dtype")
    return FLOAT_DTYPES.get(name) if isinstance(name, str) else None


def write_config(
    staging: Path, stored: ModelFolder, quantization: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    """Write config.json: the source's, with another `quantization_config`. dtype: of the model, None if the source
    does not say."""
    config = dict(stored.config) | {"quantization_config": dict(quantization)}
    if dtype is None:
        floats = [entry.dtype for entry in stored.entries.values() if entry.dtype in FLOAT_DTYPES.values()]
        config["dtype"] = str(Counter(floats).most_common(1)[0][0]).removeprefix("torch.")
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (staging / "config.json").write_text(text, encoding="utf-8")


def copied(name: str, entry: TensorEntry) -> Block:
    """A tensor as it is in the source."""

    def produce(append: Append) -> None:
        for piece in entry.pieces():
            append(name, piece)

    return Block(name, {name: (entry.shape, entry.dtype)}, produce, entry.nbytes)
