"""From the bytes of GGUF tensors to a weight: a QuantTensor where a spec says what their codes mean, else floats."""

import math
from collections.abc import Sequence

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from ptqc.codegen.export._gguf_blocks import TYPES, BlockType
from ptqc.codegen.export._gguf_layouts import Fields
from ptqc.codegen.export._gguf_parse import Contents
from ptqc.codegen.export._gguf_placement import Placement
from ptqc.errors import CheckpointError
from ptqc.packing import pack_linear
from ptqc.qtensor import QuantTensor

__all__ = ["decode_weight"]

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def decode_weight(contents: Contents, placed: Sequence[Placement], dtype: torch.dtype) -> Tensor:
    """The parameter that some tensors of a file make up. dtype: of floats, and what codes pretend to be.

    Raises: CheckpointError for numbers that are not finite, codes without a level, and types nobody here decodes.
    """
    first = placed[0]
    columns, kinds = first.shape[-1], {contents.tensors[at.stored_name].kind for at in placed}
    shape = (*first.shape[:-2], sum(at.matrix_shape[0] for at in placed) // math.prod(first.shape[:-2]), columns)
    if len(first.shape) == 1:
        values = _floats(contents, first, dtype)
        return (values if first.rows is None else torch.empty_like(values).index_copy_(0, first.rows, values)).view(
            first.weight.shape
        )
    kind = TYPES.get(next(iter(kinds)).name)
    if len(kinds) == 1 and kind is not None and kind.layout is not None:
        data = np.empty((math.prod(shape[:-1]), columns // kind.weights * kind.nbytes), np.uint8)
        for at in placed:
            data[_rows(at)] = contents.read(at.stored_name).reshape(-1, data.shape[1])
        weight = _stored(kind, data, shape, dtype, f"{contents.path}: {first.stored_name}")
        return weight.mT if first.is_transposed else weight
    numbers = torch.empty(math.prod(shape[:-1]), columns, dtype=dtype)
    for at in placed:
        numbers[_rows(at)] = _floats(contents, at, dtype).view(-1, columns)
    return numbers.view(shape).mT.contiguous() if first.is_transposed else numbers.view(shape)


def _rows(at: Placement) -> slice | Tensor:
    return slice(None) if at.rows is None else at.rows


def _floats(contents: Contents, at: Placement, dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor, less what the file adds."""
    stored = contents.tensors[at.stored_name]
    data = contents.read(at.stored_name)
    data = data.reshape(-1, data.shape[-1])
    if stored.kind in _FLOATS:
        numbers = torch.from_numpy(data).view(_FLOATS[stored.kind])
    else:
        numbers = _by_package(contents, at.stored_name, data, stored.kind)
    numbers = _finite(numbers.reshape(at.shape).to(dtype), contents, at.stored_name)
    return numbers - at.offset if at.offset else numbers


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
    return torch.from_numpy(np.ascontiguousarray(numbers, np.float32))


def _stored(
    kind: BlockType, data: NDArray[np.uint8], shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> QuantTensor:
    """data: [rows, bytes of a row]. shape: [..., out, in], of as many rows."""
    assert kind.layout is not None and kind.spec is not None
    fields, spec = kind.layout.unpack(data.reshape(-1, kind.nbytes)), kind.spec
    if not np.isfinite(fields.floats).all():
        raise CheckpointError(f"{where} has scales that are NaN or infinite; get the file again")
    codes = torch.from_numpy(fields.codes.reshape(shape))
    if spec.book is not None and int(codes.max()) >= len(spec.book.levels):
        raise CheckpointError(f"{where} has code {int(codes.max())}, {kind.name} has {len(spec.book.levels)} levels")
    parts = {"codes": spec.packer.pack(codes, spec.bits)} | _scales(kind, fields, shape[:-1])
    return QuantTensor(parts, spec, shape, dtype)


def _scales(kind: BlockType, fields: Fields, lead: tuple[int, ...]) -> dict[str, Tensor]:
    spec = kind.spec
    assert spec is not None
    floats = torch.from_numpy(fields.floats)
    if spec.scale.bits is None:
        parts = {"scale": floats[:, 0].reshape(*lead, -1).contiguous()}
        if spec.zero == "min":
            parts["zero"] = -floats[:, 1].reshape(*lead, -1)
        return parts
    groups = kind.weights // (spec.group or kind.weights)
    integers = torch.from_numpy(fields.scales)
    parts = {}
    for number, name in enumerate(("scale", "zero") if spec.zero == "min" else ("scale",)):
        own = integers[:, number * groups : (number + 1) * groups].reshape(*lead, -1)
        parts[name] = pack_linear(own, spec.scale.bits)
        parts[f"{name}_outer"] = floats[:, number].contiguous()
    return parts
