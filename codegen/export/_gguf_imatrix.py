"""Importance of input channels, and llama.cpp's files of it: imatrix.gguf, and the older imatrix.dat.

The importance of a channel is the mean square of what comes in by it. A file knows weights by their GGUF names:

    imatrix.gguf   per weight two float32 tensors: <name>.in_sum2 [experts, in], sums of squares, and <name>.counts
                   [experts, 1], how many rows they are of
    imatrix.dat    int32 entries; each int32 length, name, int32 calls, int32 values, float32 mean square times calls
"""

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ptqc.codegen.export._gguf_parse import parse
from ptqc.codegen.export._gguf_placement import Placement
from ptqc.errors import CheckpointError, ExportError

__all__ = ["importance_by_tensor", "read_imatrix", "write_imatrix"]

Floats = NDArray[np.float32]
Source = Mapping[str, Tensor] | str | os.PathLike[str] | None

_MAGIC = b"GGUF"
_SUMS, _COUNTS = ".in_sum2", ".counts"


def importance_by_tensor(source: Source, placed: Sequence[Placement]) -> tuple[dict[str, Floats], tuple[str, ...]]:
    """Importance [in] by the name of the tensor in the file, and notes on what found no tensor.

    source: see `GGUF.importance`.

    Raises: ExportError if nothing in it belongs to a tensor of this model; CheckpointError for a file at fault.
    """
    if source is None:
        return {}, ()
    if isinstance(source, (str, os.PathLike)):
        given, names = read_imatrix(source), {at.stored_name: at.stored_name for at in placed}
    else:
        given = {name: np.asarray(value.detach().float().cpu().numpy()) for name, value in source.items()}
        names = {at.stored_name: at.name for at in placed}
    found = {stored: given[name].reshape(-1) for stored, name in names.items() if name in given}
    if not found:
        known = next(iter(names.values()), "none")
        raise ExportError(
            f"the importance names {next(iter(given), 'nothing')} ..., none of which this model has; its weights are "
            f"called {known} ..."
        )
    lost = sorted(given.keys() - names.values())
    return found, (f"{len(lost)} entries of the importance have no tensor here: {lost[0]} ...",) if lost else ()


def write_imatrix(path: str | os.PathLike[str], importance: Mapping[str, Tensor | Floats], rows: int = 1) -> None:
    """Write importance [in], or [experts, in], by GGUF name, in the older format if the path ends in .dat.

    rows: that it is a mean of.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    given = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in importance.items()}
    values = {name: value.reshape(-1, value.shape[-1]) for name, value in given.items()}
    try:
        (_write_dat if target.suffix == ".dat" else _write_gguf)(temporary, values, rows)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, Floats]:
    """Importance by GGUF name, of either format: [in], or [experts * in] where there are experts.

    Raises: CheckpointError saying what is wrong with the file.
    """
    source = Path(path)
    try:
        with source.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror or error}") from error
    found = _read_gguf(source) if magic == _MAGIC else _read_dat(source)
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise CheckpointError(f"{source} holds NaN, infinite or negative numbers for {name}; make it again")
    return found


def _write_gguf(path: Path, values: Mapping[str, Floats], rows: int) -> None:
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", rows)
    for name in sorted(values):
        writer.add_tensor(name + _SUMS, values[name] * np.float32(rows))
        writer.add_tensor(name + _COUNTS, np.full((len(values[name]), 1), rows, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(path: Path) -> dict[str, Floats]:
    contents = parse(path)
    found = {}
    for name in contents.tensors:
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        if weight + _COUNTS not in contents.tensors:
            raise CheckpointError(f"{path} has {name} without {weight + _COUNTS}; make it again")
        sums, counts = contents.read_floats(name), contents.read_floats(weight + _COUNTS)
        experts = counts.size
        if experts == 0 or sums.size % experts:
            raise CheckpointError(f"{path} has {sums.size} sums for {experts} counts of {weight}; make it again")
        with np.errstate(all="ignore"):  # what is no number is refused below
            means = sums.reshape(experts, -1) / np.maximum(counts.reshape(experts, 1), 1)
        # An expert that saw nothing: all its channels count alike.
        found[weight] = np.where(counts.reshape(experts, 1) > 0, means, 1).reshape(-1).astype(np.float32)
    if not found:
        raise CheckpointError(f"{path} is a GGUF file without {_SUMS} tensors: it is no imatrix")
    return found


def _write_dat(path: Path, values: Mapping[str, Floats], rows: int) -> None:
    pieces: list[bytes] = [struct.pack("<i", len(values))]
    for name in sorted(values):
        encoded = name.encode()
        pieces.append(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 1, values[name].size))
        pieces.append(values[name].astype("<f4").tobytes())
    data = b"calibration"
    path.write_bytes(b"".join([*pieces, struct.pack("<ii", 1, len(data)), data]))


def _read_dat(path: Path) -> dict[str, Floats]:
    data = path.read_bytes()
    place = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal place
        size = struct.calcsize(form)
        if size > len(data) - place:
            raise CheckpointError(f"{path} is cut short, or no imatrix: {size} bytes are missing at {place}")
        values = struct.unpack_from(form, data, place)
        place += size
        return values

    def length(what: str) -> int:
        number = int(take("<i")[0])
        if not 0 < number <= len(data):
            raise CheckpointError(f"{path} is no imatrix: {number} {what} before byte {place} of {len(data)}")
        return number

    found = {}
    for _ in range(length("entries")):
        name = take(f"<{length('letters')}s")[0].decode("utf-8", "replace")
        calls = max(int(take("<i")[0]), 1)
        number = length("values")
        found[name] = (np.array(take(f"<{number}f"), np.float32) / np.float32(calls)).astype(np.float32)
    return found
