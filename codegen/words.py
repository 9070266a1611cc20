"""Integer codes in 32-bit words, as GPTQ, AWQ and compressed-tensors lay them out.

A code in a file is unsigned, W[o, i] = scale[o, g] * (code[o, i] - zero[o, g]) with g the group of input i, and a
symmetric weight has the zero 2^(bits-1) everywhere. Codes [out, in], scales and zeros [out, groups] are matrices; how
a matrix lies in a tensor is a `Lay`:

    packed along an axis, one little-endian stream of codes per row or column, code k of a word at bit bits * k (where
    bits do not divide 32, codes straddle words); the last word is filled with zeros
    turned: the tensor is the transposed matrix
    places: which of eight neighbours each nibble of a word holds, where that is not the first, the second, ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc.codegen.dialect import damaged
from ptqc.packing import pack_linear, unpack_linear
from ptqc.qtensor import QuantTensor
from ptqc.surroundings import Surroundings

__all__ = [
    "Groupwise", "Lay", "groups_of", "groupwise_of", "integer_reason", "order_of", "pack_words", "unpack_words",
    "weight_of",
]  # fmt: skip

_INDICES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that torch can do all with that a row of groups needs."""


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [..., n] uint8 into int32 words [..., ceil(n * bits / 32)]."""
    stream = pack_linear(codes, bits)
    whole = pad(stream, (0, -stream.shape[-1] % 4))
    # By way of one axis: an axis of length 1 may keep a stride that a view as another type does not take.
    return whole.reshape(-1).view(torch.int32).reshape(*whole.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Invert `pack_words`: [..., n] uint8."""
    stream = words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], -1)
    return unpack_linear(stream[..., : -(-n * bits // 8)], bits, n)


@dataclass(frozen=True)
class Lay:
    """How a matrix [out, columns] lies in a tensor: see the module."""

    along: Literal["out", "columns"]
    turned: bool = False
    places: tuple[int, ...] = ()

    def pack(self, matrix: Tensor, bits: int) -> Tensor:
        """matrix: [out, columns] uint8. Returns the words, int32."""
        rows = matrix if self.along == "columns" else matrix.mT
        if self.places:
            rows = rows.unflatten(-1, (-1, len(self.places)))[..., list(self.places)].flatten(-2)
        words = pack_words(rows, bits)
        return words.mT.contiguous() if self._is_crossed else words

    def unpack(self, words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
        """Invert `pack`. shape: of the matrix."""
        rows = unpack_words(words.mT if self._is_crossed else words, bits, shape[1 if self.along == "columns" else 0])
        if self.places:
            back = [self.places.index(place) for place in range(len(self.places))]
            rows = rows.unflatten(-1, (-1, len(self.places)))[..., back].flatten(-2)
        return (rows if self.along == "columns" else rows.mT).contiguous()

    @property
    def _is_crossed(self) -> bool:
        """Whether packed rows are columns of the tensor."""
        return self.turned == (self.along == "columns")


@dataclass(frozen=True)
class Groupwise:
    """Integers with one scale per row and group, in the order of the inputs.

    codes: [out, in] uint8. scale: [out, groups] as stored. zero: like scale, uint8. group_of: [in] int32, the group of
    each input.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_of: Tensor


def integer_reason(weight: QuantTensor, *, bits: Sequence[int], scales: Sequence[str]) -> str | None:
    """Why a weight is not made of integers of these widths with one scale of these types per row and group."""
    spec = weight.spec
    if spec.codebook is not None or spec.bits not in bits or spec.zero not in ("none", "int") or spec.rows != 1:
        widths = ", ".join(map(str, bits))
        return f"{spec} is no grid of {widths}-bit integers with integer zeros and one scale per row and group"
    if spec.scale.bits is not None or spec.scale.dtype not in scales:
        return f"the scales of {spec} are not {' or '.join(scales)}"
    return None


def groupwise_of(weight: QuantTensor) -> Groupwise:
    """The codes of a weight with an integer spec of plain scales; nothing around it but an order counts."""
    spec, (out_features, in_features) = weight.spec, weight.stored_shape
    rows, columns = spec.groups(weight.stored_shape)
    parts = weight.parts
    codes = spec.packer.unpack(parts["codes"], spec.bits, in_features)
    group_of = torch.arange(in_features, dtype=torch.int32, device=codes.device) // (spec.group or in_features)
    if weight.surroundings.order:
        back = weight.extras["order"].argsort()
        codes, group_of = codes.index_select(1, back), group_of.index_select(0, back)
    if spec.zero == "int":
        zero = unpack_linear(parts["zero"], spec.bits, columns)
    else:
        zero = torch.full((rows, columns), 2 ** (spec.bits - 1), dtype=torch.uint8, device=codes.device)
    scale = parts["scale"]
    return Groupwise(codes, scale.expand(out_features, -1), zero.expand(out_features, -1), group_of)


def weight_of(form: Groupwise, meta: QuantTensor, extras: dict[str, Tensor] | None = None) -> QuantTensor:
    """Invert `groupwise_of`. meta: the described weight. extras: what is around it besides an order."""
    spec, codes, extras = meta.spec, form.codes, dict(extras or {})
    if meta.surroundings.order:
        extras["order"] = form.group_of.argsort(stable=True).to(torch.int32)
        codes = codes.index_select(1, extras["order"])
    parts = {"codes": spec.packer.pack(codes, spec.bits), "scale": form.scale.contiguous()}
    if spec.zero == "int":
        parts["zero"] = pack_linear(form.zero, spec.bits)
    return meta.with_parts(parts, extras=extras)


def groups_of(in_features: int, columns: int, name: str) -> int | None:
    """Inputs that share a scale, None for the whole row.

    Raises: CheckpointError if the columns of the scales do not divide the inputs.
    """
    if columns < 1 or in_features < 1 or in_features % columns:
        raise damaged(name, f"{columns} groups do not divide {in_features} inputs")
    return None if columns == 1 else in_features // columns


def order_of(group_of: Tensor, columns: int, name: str) -> Surroundings:
    """What the groups of the inputs [in] ask for: an order, unless inputs are grouped as they come.

    Raises: CheckpointError if groups have different sizes or do not exist.
    """
    in_features = group_of.numel()
    if group_of.dtype not in _INDICES or group_of.ndim != 1:
        raise damaged(name, f"g_idx is {group_of.dtype} {list(group_of.shape)}, no row of whole numbers")
    group = in_features // columns
    if columns == 1 or torch.equal(group_of.long(), torch.arange(in_features) // group):
        return Surroundings()
    if group_of.min() < 0 or group_of.max() >= columns:
        raise damaged(name, f"g_idx speaks of groups outside 0 .. {columns - 1}")
    if not (group_of.long().bincount(minlength=columns) == group).all():
        raise damaged(name, f"g_idx does not put {group} inputs into every group")
    return Surroundings(order=True)
