"""From the bytes of a GGUF tensor to a weight: a QuantTensor where a spec says what its codes mean, else floats."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from ptqc.codegen.export._gguf_blocks import TYPES, BlockType
from ptqc.codegen.export._gguf_layouts import Fields
from ptqc.codegen.export._gguf_parse import Contents
from ptqc.errors import CheckpointError
from ptqc.packing import pack_linear
from ptqc.qtensor import QuantTensor

__all__ = ["decode_tensor"]

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def decode_tensor(contents: Contents, name: str, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """A tensor of the file. dtype: of floats, and what codes pretend to be. rows: row i of the file is row rows[i].

    Raises: CheckpointError for numbers that are not finite, codes without a level, and types nobody here decodes.
    """
    at = contents.tensors[name]
    data = contents.read(name).reshape(at.shape[0], -1)
    if rows is not None:
        arranged = np.empty_like(data)
        arranged[rows.numpy()] = data
        data = arranged
    kind = TYPES.get(at.kind.name)
    if at.kind in _FLOATS:
        floats = torch.from_numpy(data).view(_FLOATS[at.kind]).reshape(at.shape).to(dtype)
        return _finite(floats, contents, name)
    if kind is None or kind.layout is None or len(at.shape) != 2:
        return _finite(_by_package(contents, name, data, at.kind).to(dtype), contents, name)
    return _stored(kind, data, at.shape, dtype, f"{contents.path}: {name}")


def _finite(floats: Tensor, contents: Contents, name: str) -> Tensor:
    if not bool(torch.isfinite(floats).all()):
        raise CheckpointError(f"{contents.path} holds NaN or infinite values in {name}; get the file again")
    return floats


def _by_package(contents: Contents, name: str, data: NDArray[np.uint8], kind: GGMLQuantizationType) -> Tensor:
    """Decoded by the gguf package, for types whose codes no spec describes."""
    try:
        with np.errstate(all="ignore"):
            numbers = gguf.quants.dequantize(data, kind)
    except NotImplementedError as error:
        known = ", ".join(TYPES)
        raise CheckpointError(f"{contents.path} stores {name} as {kind.name}; types to be read: {known}") from error
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32).reshape(contents.tensors[name].shape))


def _stored(
    kind: BlockType, data: NDArray[np.uint8], shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> QuantTensor:
    assert kind.layout is not None and kind.spec is not None
    rows, columns = shape
    fields, spec = kind.layout.unpack(data.reshape(-1, kind.nbytes)), kind.spec
    if not np.isfinite(fields.floats).all():
        raise CheckpointError(f"{where} has scales that are NaN or infinite; get the file again")
    codes = torch.from_numpy(fields.codes.reshape(rows, columns))
    if spec.book is not None and int(codes.max()) >= len(spec.book.levels):
        raise CheckpointError(f"{where} has code {int(codes.max())}, {kind.name} has {len(spec.book.levels)} levels")
    parts = {"codes": spec.packer.pack(codes, spec.bits)} | _scales(kind, fields, rows)
    return QuantTensor(parts, spec, shape, dtype)


def _scales(kind: BlockType, fields: Fields, rows: int) -> dict[str, Tensor]:
    spec = kind.spec
    assert spec is not None
    floats = torch.from_numpy(fields.floats)
    if spec.scale.bits is None:
        parts = {"scale": floats[:, 0].reshape(rows, -1).contiguous()}
        if spec.zero == "min":
            parts["zero"] = -floats[:, 1].reshape(rows, -1)
        return parts
    groups = kind.weights // (spec.group or kind.weights)
    integers = torch.from_numpy(fields.scales)
    parts = {}
    for number, name in enumerate(("scale", "zero") if spec.zero == "min" else ("scale",)):
        own = integers[:, number * groups : (number + 1) * groups].reshape(rows, -1)
        parts[name] = pack_linear(own, spec.scale.bits)
        parts[f"{name}_outer"] = floats[:, number].contiguous()
    return parts
