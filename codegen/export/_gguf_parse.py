"""Reading the structure of a GGUF file, which may be hostile: every count and offset is held against the file's size
before anything of that size is made.

    "GGUF", version u32, tensors u64, keys u64
    keys:     name, type u32, value             strings: length u64, bytes
    tensors:  name, axes u32, sizes u64 (innermost first), type u32, offset u64
    padding to `general.alignment`, then the data; offsets count from here
"""

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from ptqc.errors import CheckpointError

__all__ = ["Contents", "StoredTensor", "parse"]

_V = GGUFValueType
_NUMBERS = {
    _V.UINT8: "<u1", _V.INT8: "<i1", _V.UINT16: "<u2", _V.INT16: "<i2", _V.UINT32: "<u4", _V.INT32: "<i4",
    _V.FLOAT32: "<f4", _V.UINT64: "<u8", _V.INT64: "<i8", _V.FLOAT64: "<f8", _V.BOOL: "<u1",
}  # fmt: skip
_SMALLEST_KEY, _SMALLEST_TENSOR, _SMALLEST_STRING, _SMALLEST_ARRAY = 13, 32, 8, 12
"""Bytes that an entry takes at least: no file holds more entries than its size over this."""
_LONGEST_NAME = 1 << 16
_DEEPEST_ARRAY = 3
_MOST_AXES = 4
_LARGEST_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. shape: outermost axis first. start: byte in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """A parsed file. metadata: numbers, strings, NumPy arrays and lists by key."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, a row of blocks at a time: [..., bytes of a row].

        Raises: CheckpointError if the file has changed since.
        """
        at = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(at.start)
            data = np.fromfile(file, np.uint8, at.nbytes)
        if data.size != at.nbytes:
            raise CheckpointError(f"{self.path} ends within {name}: it became shorter while it was read")
        return data.reshape(*at.shape[:-1], -1)

    def read_floats(self, name: str) -> NDArray[np.float32]:
        """A tensor stored as float32.

        Raises: CheckpointError if it is stored as something else.
        """
        if self.tensors[name].kind != GGMLQuantizationType.F32:
            raise CheckpointError(f"{self.path} stores {name} as {self.tensors[name].kind.name}, not F32")
        return self.read(name).view(np.float32).reshape(self.tensors[name].shape)


def parse(path: str | os.PathLike[str]) -> Contents:
    """Read metadata and the tensor table; no tensor.

    Raises: CheckpointError saying what is wrong, and where.
    """
    source = Path(path)
    try:
        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(source, data).contents()
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        if isinstance(error, CheckpointError):
            raise
        reason = "it is empty" if isinstance(error, ValueError) else error.strerror
        raise CheckpointError(f"cannot read {source}: {reason}") from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.place = path, data, len(data), 0

    def fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is no sound GGUF file: {what} (at byte {self.place} of {self.size})")

    def contents(self) -> Contents:
        if self.take(4) != b"GGUF":
            raise self.fault("it does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise self.fault(f"version {version} is not 2 or 3 (a big-endian file shows as a huge version)")
        tensors = self.count("tensors", self.number("<Q"), _SMALLEST_TENSOR)
        keys = self.count("keys", self.number("<Q"), _SMALLEST_KEY)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string(_LONGEST_NAME)
            if key in metadata:
                raise self.fault(f"key {key!r} appears twice")
            metadata[key] = self.value(self.kind(), 0)
        rows = [self.tensor() for _ in range(tensors)]
        return Contents(self.path, metadata, self.placed(rows, self.alignment(metadata)))

    # ---------------------------------------------------------------- pieces

    def take(self, size: int) -> bytes:
        if size > self.size - self.place:
            raise self.fault(f"it ends where {size} more bytes are announced")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def count(self, what: str, number: int, smallest: int) -> int:
        if number * smallest > self.size - self.place:
            raise self.fault(f"{number} {what} do not fit into it")
        return number

    def string(self, longest: int | None = None) -> str:
        length = self.count("letters", self.number("<Q"), 1)
        if longest is not None and length > longest:
            raise self.fault(f"a name of {length} letters")
        return self.take(length).decode("utf-8", "replace")

    def kind(self) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.fault(f"no value has type {number}") from None

    def value(self, kind: GGUFValueType, depth: int) -> Any:
        if kind == _V.STRING:
            return self.string()
        if kind != _V.ARRAY:
            number = np.frombuffer(self.take(np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind])[0].item()
            return bool(number) if kind == _V.BOOL else number
        if depth == _DEEPEST_ARRAY:
            raise self.fault(f"arrays within arrays, more than {_DEEPEST_ARRAY} deep")
        inner, number = self.kind(), self.number("<Q")
        if inner in _NUMBERS:
            width = np.dtype(_NUMBERS[inner]).itemsize
            self.count("numbers", number, width)
            return np.frombuffer(self.take(number * width), _NUMBERS[inner]).copy()
        smallest = _SMALLEST_STRING if inner == _V.STRING else _SMALLEST_ARRAY
        return [self.value(inner, depth + 1) for _ in range(self.count("entries", number, smallest))]

    def tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name, axes = self.string(_LONGEST_NAME), self.number("<I")
        if not 1 <= axes <= _MOST_AXES:
            raise self.fault(f"{name!r} has {axes} axes")
        sizes = [self.number("<Q") for _ in range(axes)]
        number = self.number("<I")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self.fault(f"{name!r} is of type {number}, which this version does not know") from None
        block = GGML_QUANT_SIZES[kind][0]
        if min(sizes) < 1 or sizes[0] % block:
            raise self.fault(f"{name!r} has axes {sizes}, which {kind.name} with blocks of {block} cannot store")
        return name, kind, tuple(reversed(sizes)), self.number("<Q")

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise self.fault(f"general.alignment is {alignment!r}, no power of two up to {_LARGEST_ALIGNMENT}")
        return alignment

    def placed(
        self, rows: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, StoredTensor]:
        base = -(-self.place // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, kind, shape, offset in rows:
            block, width = GGML_QUANT_SIZES[kind]
            nbytes = width
            for size in (*shape[:-1], shape[-1] // block):
                nbytes *= size  # Python integers: nothing overflows
            if name in found:
                raise self.fault(f"tensor {name!r} appears twice")
            if offset % alignment or base + offset + nbytes > self.size:
                raise self.fault(f"{name!r} with {nbytes} bytes at offset {offset} lies outside of the file")
            found[name] = StoredTensor(kind, shape, base + offset, nbytes)
        end = 0
        for name, at in sorted(found.items(), key=lambda item: item[1].start):
            if at.start < end:
                raise self.fault(f"{name!r} overlaps the tensor before it")
            end = at.start + at.nbytes
        return found
