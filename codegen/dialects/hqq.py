"""HQQ, as transformers 4 and the hqq package store it: integers with zeros in floating point, in groups along `in`.

    W_q             the codes [groups of all rows, group], packed along the first axis: row r, r + step, r + 2 step ...
                    share one number, the first in the highest bits; 8, 4, 2, 1 bits in uint8, ten of 3 bits in int32
    scale, zero     [groups of all rows, 1] in the type that is computed in
    nbits, group_size, axis, shape, packing, ...   what `Quantizer.dequantize` needs, as small tensors

W = (code - zero) * scale.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc.act_spec import ActSpec
from ptqc.codegen.dialect import (
    DIALECTS,
    Entries,
    Inventory,
    Tails,
    damaged,
    describe_or_refuse,
    nearest_integer,
    needed,
    plain_reason,
    scale_dtype_name,
)
from ptqc.codegen.words import groupwise_of
from ptqc.packing import pack_linear
from ptqc.qtensor import QuantTensor
from ptqc.spec import ScaleSpec, WeightSpec

__all__ = ["HQQ"]


@dataclass(frozen=True)
class _Packing:
    """How codes share a number. name: hqq's; count: codes in one number; dtype: its type."""

    name: str
    count: int
    dtype: torch.dtype


_PACKINGS = {
    8: _Packing("8bit_u8", 1, torch.uint8),
    4: _Packing("4bit_u8", 2, torch.uint8),
    3: _Packing("3bit_32", 10, torch.int32),
    2: _Packing("2bit_u8", 4, torch.uint8),
    1: _Packing("1bit_u8", 8, torch.uint8),
}
_EXACT = {"f16": (torch.float16, torch.float32), "bf16": (torch.bfloat16, torch.float32), "f32": (torch.float32,)}
"""Types of a model that hold scales of a type."""


@DIALECTS.register("hqq")
@dataclass(frozen=True)
class HQQ:
    """Writes and reads HQQ."""

    example: ClassVar[str] = "int4g64f"
    tails: ClassVar[tuple[str, ...]] = (
        "W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "unpack_view_dtype", "compute_dtype",
        "view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config",
        "channel_wise", "optimize", "round_zero",
    )  # fmt: skip
    markers: ClassVar[tuple[str, ...]] = ("W_q",)

    @staticmethod
    def of_config(config: Mapping[str, Any], where: str) -> "HQQ":
        """See `ptqc.codegen.dialect.Dialect`."""
        return HQQ()

    # ---------------------------------------------------------------- writing

    def refuses(self, weight: QuantTensor) -> str | None:
        """Integers of 8, 4, 3, 2 or 1 bits with any plain scales and zeros that the model's type holds."""
        spec = weight.spec
        reason = plain_reason(weight, order=spec.group is None)
        if reason is not None:
            return reason
        if spec.codebook or spec.bits not in _PACKINGS or spec.zero == "min" or spec.rows != 1 or spec.scale.bits:
            widths = ", ".join(map(str, _PACKINGS))
            return f"{spec} is no grid of {widths}-bit integers with one plain scale and zero per row and group"
        if weight.dtype not in _EXACT.get(spec.scale.dtype, ()):
            return f"scales of {spec.scale.dtype} are stored in {weight.dtype}, which does not hold them"
        count = _PACKINGS[spec.bits].count
        rows = weight.stored_shape[0] * spec.groups(weight.stored_shape)[1]
        return f"{count} does not divide its {rows} groups" if spec.bits != 3 and rows % count else None

    def nearest(self, weight: QuantTensor) -> tuple[WeightSpec, ActSpec]:
        """See `ptqc.codegen.dialect.Dialect`."""
        held = next((name for name, dtypes in _EXACT.items() if weight.dtype in dtypes), "f32")
        return nearest_integer(weight, tuple(_PACKINGS)).with_scale_dtype(held), ActSpec()

    def write(self, weight: QuantTensor) -> Tails:
        """See `ptqc.codegen.dialect.Dialect`."""
        spec, shape = weight.spec, weight.stored_shape
        form = groupwise_of(weight)
        group, packing = spec.group or shape[1], _PACKINGS[spec.bits]
        zero = weight.parts["zero"] if spec.zero == "float" else form.zero
        numbers = {"nbits": spec.bits, "group_size": group, "axis": 1}
        flags = {
            "view_as_float": 0, "quant_scale": 0, "quant_zero": 0, "offload_meta": 0, "encoded_state_dict": 1,
            "stores_quant_config": 1, "channel_wise": 1, "optimize": 1, "round_zero": int(spec.zero != "float"),
        }  # fmt: skip
        texts = {"packing": packing.name, "unpack_view_dtype": str(packing.dtype), "compute_dtype": str(weight.dtype)}
        small: Callable[..., Tensor] = lambda value, kind: torch.tensor(value, dtype=kind, device=form.codes.device)  # noqa: E731
        return {
            "W_q": _pack(form.codes.reshape(-1, group), spec.bits),
            "scale": form.scale.reshape(-1, 1).to(weight.dtype),
            "zero": zero.reshape(-1, 1).to(weight.dtype),
            "shape": small(list(shape), torch.int64),
            **{name: small(value, torch.int32) for name, value in numbers.items()},
            **{name: small(value, torch.uint8) for name, value in flags.items()},
            **{name: small(list(text.encode()), torch.uint8) for name, text in texts.items()},
        }

    def settled(self, inventory: Inventory) -> "HQQ":
        """See `ptqc.codegen.dialect.Dialect`."""
        return self

    def config(self, inventory: Inventory) -> dict[str, Any]:
        """The commonest width and group: each weight says its own, and readers go by that."""
        weights = inventory.weights.values()
        kinds = Counter((weight.spec.bits, weight.spec.group or weight.stored_shape[1]) for weight in weights)
        bits, group = kinds.most_common(1)[0][0]
        shared = {
            "nbits": bits, "group_size": group, "channel_wise": True, "optimize": True, "round_zero": False, "axis": 1,
            "view_as_float": False,
        }  # fmt: skip
        quant = {"weight_quant_params": shared, "scale_quant_params": None, "zero_quant_params": None}
        return {
            "quant_method": "hqq", "quant_config": quant | {"offload_meta": False},
            "skip_modules": list(inventory.floats),
        }  # fmt: skip

    def notes(self, inventory: Inventory) -> Sequence[str]:
        """See `ptqc.codegen.dialect.Dialect`."""
        return (
            "transformers 5 does not load HQQ folders (it starts from random weights); transformers 4.57 with hqq does",
        )

    # ---------------------------------------------------------------- reading

    def describe(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        codes, scale, zero = needed(entries, name, "W_q", "scale", "zero")
        bits, axis = (_number(name, entries, tail) for tail in ("nbits", "axis"))
        group, shape = _number(name, entries, "group_size"), _numbers(name, entries, "shape")
        packing = _PACKINGS.get(bits)
        if axis != 1 or packing is None or len(shape) != 2 or min(*shape, group) < 1:
            raise damaged(name, f"{bits} bits along axis {axis} in groups of {group} of {shape}: only axis 1 is known")
        if any(_number(name, entries, flag) for flag in ("view_as_float", "quant_scale", "quant_zero")):
            raise damaged(name, "codes seen as floats and quantized scales are not known; save it without")
        numbers = shape[0] * shape[1]
        rows = numbers // group
        wanted = (-(-rows // packing.count), group)
        is_whole = numbers % group == 0 and shape[1] % group == 0
        if not is_whole or codes.shape != wanted or codes.dtype != packing.dtype:
            raise damaged(name, f"W_q is {codes.dtype} {list(codes.shape)}, not {packing.dtype} {list(wanted)}")
        for entry in (scale, zero):
            if int(torch.Size(entry.shape).numel()) != rows or entry.dtype != scale.dtype:
                raise damaged(name, f"scale and zero are {list(scale.shape)} and {list(zero.shape)}, not {rows} each")
        spec = WeightSpec(
            bits=bits, group=None if group == shape[1] else group, zero="float",
            scale=ScaleSpec(dtype=scale_dtype_name(name, scale.dtype)),
        )  # fmt: skip
        return describe_or_refuse(name, spec, shape, dtype)

    def read(self, weight: QuantTensor, entries: Entries) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        spec, shape = weight.spec, weight.stored_shape
        rows = shape[0] * spec.groups(shape)[1]
        codes = _unpack(entries["W_q"].read(), spec.bits, rows).reshape(shape)
        scale, zero = (entries[tail].read().reshape(shape[0], -1) for tail in ("scale", "zero"))
        return weight.with_parts({"codes": pack_linear(codes, spec.bits), "scale": scale, "zero": zero})


def _pack(codes: Tensor, bits: int) -> Tensor:
    """codes: [rows, group] uint8. Returns [ceil(rows / count), group]."""
    packing = _PACKINGS[bits]
    wide = pad(codes.to(packing.dtype), (0, 0, 0, -codes.shape[0] % packing.count)).unflatten(0, (packing.count, -1))
    packed = torch.zeros_like(wide[0])
    for place, slab in enumerate(wide.unbind(0)):
        packed |= slab << (packing.count - 1 - place) * bits
    return packed


def _unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Invert `_pack`: [rows, group] uint8."""
    count = _PACKINGS[bits].count
    shifts = [(count - 1 - place) * bits for place in range(count)]
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in shifts])[:rows].to(torch.uint8)


def _numbers(name: str, entries: Entries, tail: str) -> list[int]:
    (entry,) = needed(entries, name, tail)
    is_whole = not entry.dtype.is_floating_point and not entry.dtype.is_complex
    if not is_whole or int(torch.Size(entry.shape).numel()) > 8:
        raise damaged(name, f"{tail} is {entry.dtype} {list(entry.shape)}, no whole number")
    return [int(value) for value in entry.read().flatten().tolist()]


def _number(name: str, entries: Entries, tail: str) -> int:
    numbers = _numbers(name, entries, tail)
    if len(numbers) != 1:
        raise damaged(name, f"{tail} holds {len(numbers)} numbers")
    return numbers[0]
