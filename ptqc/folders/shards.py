"""Writing tensors into safetensors files, piece by piece, so that no more than one weight is held.

The layout of every tensor is known before the first byte is written: the header is exact, the shards are decided, and
the space a checkpoint takes can be asked of the disk beforehand.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ptqc.folders.safefile import DTYPES, Layout, layout_bytes

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Append",
    "Block",
    "TensorWriter",
    "assign_shards",
    "write_shards",
    "written_bytes",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Append = Callable[[str, Tensor], None]
"""Takes the name of a tensor and its next values, or its next bytes as uint8."""


def _header(layout: Layout, metadata: Mapping[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where each tensor begins. Wide types come first, so that all are aligned."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins, end = {}, 0
    for name, (shape, dtype) in sorted(layout.items(), key=lambda item: -item[1][1].itemsize):
        begins[name], end = end, end + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: len(start) + begin for name, begin in begins.items()}


class TensorWriter:
    """Writes a safetensors file whose layout is known, piece by piece, its tensors in any order.

    metadata: strings for the header. Use as a context manager; leaving it without an error checks that every tensor
    is complete.
    """

    def __init__(self, path: str | os.PathLike[str], layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        start, self._next = _header(layout, metadata)
        self._missing = {name: layout_bytes({name: tensor}) for name, tensor in layout.items()}
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._write(0, memoryview(start))

    def append(self, name: str, piece: Tensor) -> None:
        """Write the next values of a tensor, or its next bytes as uint8."""
        flat = piece.detach().cpu().contiguous().view(-1).view(torch.uint8)
        assert flat.numel() <= self._missing[name], f"{name} is longer than its layout says"
        self._write(self._next[name], flat.numpy().data)
        self._next[name] += flat.numel()
        self._missing[name] -= flat.numel()

    def _write(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        left = [name for name, count in self._missing.items() if count]
        assert kind is not None or not left, f"incomplete tensors: {left}"


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors that are made together and stay in one file: all parts of a weight, or one float tensor.

    produce: hands every piece of every tensor of the layout to its argument. source_bytes: what is read to do so.
    """

    name: str
    layout: Layout
    produce: Callable[[Append], None]
    source_bytes: int = 0


def assign_shards(blocks: Iterable[Block], max_shard_bytes: float) -> list[list[Block]]:
    """Cut blocks, in their order, into files of at most `max_shard_bytes` (a larger block gets its own)."""
    shards: list[list[Block]] = [[]]
    filled = 0
    for block in blocks:
        size = layout_bytes(block.layout)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(block)
        filled += size
    return shards


def _merged(blocks: Iterable[Block]) -> Layout:
    return {name: tensor for block in blocks for name, tensor in block.layout.items()}


def written_bytes(shards: Sequence[Sequence[Block]]) -> int:
    """Bytes of the files that `write_shards` writes, the index left out."""
    layouts = [_merged(shard) for shard in shards]
    return sum(len(_header(layout)[0]) + layout_bytes(layout) for layout in layouts)


def write_shards(
    folder: Path, shards: Sequence[Sequence[Block]], on_block: Callable[[Block], None] = lambda block: None
) -> None:
    """Write one safetensors file per shard, and the index if there are several. on_block: called after each block."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = _merged(shard)
        weight_map |= dict.fromkeys(layout, file)
        with TensorWriter(folder / file, layout) as writer:
            for block in shard:
                block.produce(writer.append)
                on_block(block)
    if len(shards) > 1:
        total = sum(layout_bytes(_merged(shard)) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
