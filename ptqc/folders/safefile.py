"""Safetensors files, read as if their author meant harm.

A file is n (8 bytes, little endian), a JSON header of n bytes, and the tensors' bytes without holes. The header maps
each name to {"dtype", "shape", "data_offsets": [begin, end]}, counted from the end of the header, and may hold
"__metadata__", strings to strings. Files are read with plain reads, never mapped: mapped pages count as resident
memory, and a file that shrinks while it is mapped kills the process.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ptqc.errors import CheckpointError

__all__ = ["DTYPES", "Layout", "SafeFile", "TensorEntry", "layout_bytes", "parse_header", "read_safefile"]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors package."""

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor by name."""


def layout_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `start` counts from the beginning of the file at `path`."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """The tensor.

        Raises: CheckpointError if the file has become shorter, or cannot be read.
        """
        return self._as_tensor(self.pieces(max(self.nbytes, 1)), self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor seen as a matrix [all other axes, last axis]."""
        columns = self.shape[-1]
        width = columns * self.dtype.itemsize
        shape, begin = (stop - start, columns), self.start + start * width
        return TensorEntry(self.path, self.dtype, shape, begin, (stop - start) * width).read()

    def pieces(self, size: int = 1 << 23) -> Iterator[Tensor]:
        """Its bytes in order, as uint8 tensors of at most `size` bytes."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.start)
                for begin in range(0, self.nbytes, size):
                    piece = torch.empty(min(size, self.nbytes - begin), dtype=torch.uint8)
                    _read_into(file, piece, self.path)
                    yield piece
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def _as_tensor(self, pieces: Iterator[Tensor], shape: tuple[int, ...]) -> Tensor:
        flat = next(pieces, torch.empty(0, dtype=torch.uint8))
        # A byte other than 0 and 1 is no bool: torch may do anything with it.
        return (flat != 0).view(shape) if self.dtype == torch.bool else flat.view(self.dtype).view(shape)


@dataclass(frozen=True, slots=True)
class SafeFile:
    """A parsed header: the tensors of a file by name, in the order of their bytes, and its metadata."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def _read_into(file: BinaryIO, buffer: Tensor, path: Path) -> None:
    view = buffer.numpy().data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{path} has become {len(view)} bytes too short; download or save it again")
        view = view[count:]


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"cannot read {path}: {error.strerror or error}; give a readable safetensors file")


# -------------------------------------------------------------------- reading


def read_safefile(path: str | os.PathLike[str]) -> SafeFile:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises: CheckpointError that names the file and says what is wrong with it.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > size - 8 or length > _LARGEST_HEADER:
                raise _no_safefile(path, start + file.read(64), size, length)
            header = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from None
    return parse_header(path, header, size)


_DISGUISES: dict[bytes, str] = {
    b"PK\x03\x04": "a zip archive, probably a pickle written by torch.save",
    b"\x80": "a pickle",
    b"version https://git-lfs": "a git-lfs pointer; run `git lfs pull`",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
}


def _no_safefile(path: Path, start: bytes, size: int, length: int) -> CheckpointError:
    for magic, what in _DISGUISES.items():
        if start.startswith(magic):
            return CheckpointError(f"{path} is no safetensors file but {what}; give the model as safetensors")
    return CheckpointError(
        f"{path} holds {size} bytes but announces a header of {length}; "
        "it is truncated or no safetensors file, download or save it again"
    )


def parse_header(path: Path, header: bytes, size: int) -> SafeFile:
    """Check a header of a file of `size` bytes: names, dtypes and shapes, and that the tensors fill the file exactly.

    Raises: CheckpointError that names the file and what is wrong.
    """
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise _broken(path, f"the header is no valid JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise _broken(path, "the header is no JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ is no table of strings")
    data_start = 8 + len(header)
    entries = {name: _entry(path, name, field, data_start) for name, field in fields.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    end = data_start
    for name, entry in ordered.items():
        if entry.start != end:
            fault = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise _broken(path, f"tensor {name!r} {fault}")
        end += entry.nbytes
    if end != size:
        fault = f"it is {end - size} bytes short" if end > size else f"{size - end} bytes follow the last tensor"
        raise _broken(path, fault)
    return SafeFile(path, ordered, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _broken(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {fault}; download or save it again")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # type() because True is an int


def _entry(path: Path, name: str, field: object, data_start: int) -> TensorEntry:
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or math.prod(max(n, 1) for n in shape) >= 2**63:
        raise _broken(path, f"tensor {name!r} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise _broken(path, f"tensor {name!r} has no valid data_offsets")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise _broken(path, f"tensor {name!r}: {dtype} of shape {shape} takes {nbytes} bytes, not {end - begin}")
    return TensorEntry(path, DTYPES[dtype], tuple(shape), data_start + begin, nbytes)
