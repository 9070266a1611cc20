"""From logical codes, scales and zeros to the stored parts of a weight, and back to numbers.

The logical form of a weight [..., out, in] is codes [..., out, in // vector], scale and zero
[..., out // rows, in // group] (`Codes`). The stored form is a handful of tensors, the *parts*, whose names, shapes
and types follow from the spec alone:

    codes         packed, uint8 [..., out, bytes]; float8 codebooks store float8 [..., out, in]
    scale         float, or packed integer codes [..., out // rows, bytes] of scales
    scale_outer   float [blocks] over the flattened scales, and scale_offset [] for the dynamic map
    zero          packed integers, or like scale (then also zero_outer)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc.codebooks import dynamic_map, nearest_codes
from ptqc.errors import SpecError
from ptqc.packing import PACKINGS, pack_linear, unpack_linear
from ptqc.spec import SCALE_DTYPES, ScaleSpec, WeightSpec

__all__ = [
    "Codes", "Parts", "decode", "decode_scales", "encode", "minimum_as_zero", "part_layout", "part_names",
    "round_scale", "row_scales",
]  # fmt: skip

Parts = dict[str, Tensor]
"""The stored tensors of a weight by name."""


@dataclass(frozen=True, slots=True)
class Codes:
    """Logical form of a weight: what a method returns.

    codes: [..., out, in // vector] uint8 (float8 where the codebook is a float type, int64 above 8 bits).
    scale: [..., out // rows, in // group] float32, not yet rounded for storage: `encode` rounds once (rounding nested
    scales twice moves them). zero: like scale, or None; in units of codes, except for zero="min", where it is the
    minimum in units of the weight.
    order: [*lead, in] int64 where the method reordered the inputs: column j of codes, scale and zero belongs to input
    order[j] of the weight (act-order of GPTQ); None where they are as given.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None


def part_names(spec: WeightSpec) -> list[str]:
    """Names of the parts of a weight stored as `spec`, in the order in which ops take them."""
    nested = spec.scale.is_nested
    names = ["codes", "scale"]
    if nested:
        names += ["scale_outer", "scale_offset"] if spec.scale.dynamic else ["scale_outer"]
    if spec.zero != "none":
        names.append("zero")
    if spec.zero in ("float", "min") and nested:
        names.append("zero_outer")
    return names


def part_layout(spec: WeightSpec, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part of a weight of `shape` [..., out, in].

    Raises: SpecError if no group fits the shape.
    """
    rows, columns = spec.groups(shape)
    lead, out_features, in_features = tuple(shape[:-2]), shape[-2], shape[-1]
    code_dtype = spec.book.float_dtype if spec.book else None
    float_dtype = SCALE_DTYPES[spec.scale.dtype]
    code_bytes = spec.packer.row_bytes(spec.bits, in_features // spec.vector)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name in part_names(spec):
        if name == "codes":
            layout[name] = ((*lead, out_features, code_bytes), code_dtype or torch.uint8)
        elif name.endswith("_outer"):
            layout[name] = ((-(-math.prod(lead) * rows * columns // (spec.scale.block or 1)),), float_dtype)
        elif name == "scale_offset":
            layout[name] = ((), torch.float32)
        elif name == "zero" and spec.zero == "int":
            layout[name] = ((*lead, rows, PACKINGS["linear"].row_bytes(spec.bits, columns)), torch.uint8)
        elif spec.scale.is_nested:
            layout[name] = ((*lead, rows, PACKINGS["linear"].row_bytes(spec.scale.bits or 8, columns)), torch.uint8)
        else:
            layout[name] = ((*lead, rows, columns), float_dtype)
    return layout


# -------------------------------------------------------------------- scales


def _blocks(flat: Tensor, block: int) -> Tensor:
    return pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _dynamic_codes(values: Tensor) -> Tensor:
    """Codes in the dynamic map of values in [-1, 1]."""
    # bitsandbytes 0.50 looks codes up by the value rounded to one of 65536 points when it runs on a CPU; one scale in
    # 500 gets another code than by the value itself (as on CUDA). We agree with it bit for bit.
    points = ((values + 1) * 0.5 * 65535 + 0.5).floor()
    return nearest_codes(points / 65535 * 2 - 1, dynamic_map().to(values.device))


def _encode_scale(scale: Tensor, spec: ScaleSpec, name: str) -> Parts:
    dtype = SCALE_DTYPES[spec.dtype]
    if spec.bits is None or spec.block is None:
        return {name: scale.to(dtype)}
    flat = scale.flatten().float()
    if spec.dynamic:
        offset = flat.mean()
        blocks = _blocks(flat - offset, spec.block)
        outer = blocks.abs().amax(-1)
        codes = _dynamic_codes(blocks * (1 / outer.clamp_min(torch.finfo(torch.float32).tiny))[:, None])
        parts = {f"{name}_outer": outer, f"{name}_offset": offset}
    else:
        blocks = _blocks(flat, spec.block)
        bias = 2 ** (spec.bits - 1) if spec.signed else 0
        largest = 2**spec.bits - 1 - bias
        outer = (blocks.abs().amax(-1) / largest).to(dtype)
        steps = blocks / outer.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes = (steps.round().clamp(-bias, largest) + bias).to(torch.uint8)
        parts = {f"{name}_outer": outer}
    parts[name] = pack_linear(codes.flatten()[: flat.numel()].view(scale.shape), spec.bits)
    return parts


def _decode_scale(parts: Mapping[str, Tensor], spec: ScaleSpec, name: str, columns: int) -> Tensor:
    if spec.bits is None or spec.block is None:
        return parts[name].float()
    codes = unpack_linear(parts[name], spec.bits, columns)
    outer = parts[f"{name}_outer"].float().repeat_interleave(spec.block)[: codes.numel()].view(codes.shape)
    if spec.dynamic:
        return dynamic_map().to(codes.device)[codes.long()] * outer + parts[f"{name}_offset"]
    bias = 2 ** (spec.bits - 1) if spec.signed else 0
    return (codes.float() - bias) * outer


def round_scale(scale: Tensor, spec: WeightSpec, zero_minimum: bool = False) -> Tensor:
    """The scales (or minima) that remain after storing: methods choose codes for these.

    scale: [..., out // rows, in // group] float32. Returns the same shape, float32.
    """
    name = "zero" if zero_minimum else "scale"
    return _decode_scale(_encode_scale(scale, spec.scale, name), spec.scale, name, scale.shape[-1])


# -------------------------------------------------------------------- weights


def encode(logical: Codes, spec: WeightSpec) -> Parts:
    """Pack the logical form of a weight into its parts."""
    parts = {"codes": spec.packer.pack(logical.codes, spec.bits)}
    parts |= _encode_scale(logical.scale, spec.scale, "scale")
    if spec.zero == "none":
        return parts
    if logical.zero is None:
        raise SpecError(f"spec {spec} stores a zero, but none was given")
    if spec.zero == "int":
        parts["zero"] = pack_linear(logical.zero.to(torch.uint8), spec.bits)
    else:
        parts |= _encode_scale(logical.zero, spec.scale, "zero")
    return parts


def decode_scales(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Scale and zero in logical form, [..., out // rows, in // group] float32."""
    columns = spec.groups(shape)[1]
    scale = _decode_scale(parts, spec.scale, "scale", columns)
    if spec.zero == "none":
        return scale, None
    if spec.zero == "int":
        return scale, unpack_linear(parts["zero"], spec.bits, columns).float()
    return scale, _decode_scale(parts, spec.scale, "zero", columns)


def row_scales(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """`decode_scales` with a row for every output, [..., out, in // group] float32."""
    scale, zero = decode_scales(parts, spec, shape)
    return _by_row(scale, spec, shape[-2]), None if zero is None else _by_row(zero, spec, shape[-2])


def _by_row(scale: Tensor, spec: WeightSpec, out_features: int) -> Tensor:
    if spec.rows == 1:
        return scale
    return scale.repeat_interleave(spec.rows or out_features, dim=-2)[..., :out_features, :]


def minimum_as_zero(
    codes: Tensor, scale: Tensor, minimum: Tensor, farthest: float = math.inf
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero with scale * (code - zero) = scale * code - minimum.

    codes: [out, in]; scale, minimum: [out, in // group] float32. Where a group is constant (its scale is 0), or its
    zero would lie `farthest` steps away or more, its codes become 0 and its scale the minimum itself.
    """
    is_flat = scale == 0
    if farthest < math.inf:
        is_flat = is_flat | (minimum.abs() >= scale.abs() * farthest)
    zero = torch.where(is_flat, torch.where(minimum == 0, 0.0, 1.0), minimum / torch.where(is_flat, 1.0, scale))
    spread = is_flat.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    return codes.masked_fill(spread, 0), torch.where(is_flat, minimum, scale), zero


def levels(codes: Tensor, spec: WeightSpec) -> Tensor:
    """The float32 level that each code stands for, codes: unpacked, any shape; vectors lie along the last axis."""
    book = spec.book
    if book is not None and book.lattice is not None:
        return book.lattice.points(codes).flatten(-2)
    if book is not None:
        return codes.float() if book.float_dtype else book.table(codes.device)[codes.int()]
    return codes.float() - 2 ** (spec.bits - 1) if spec.is_symmetric else codes.float()


def decode(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The numbers a stored weight stands for, [..., out, in] in `dtype`, computed in float32."""
    scale, zero = decode_scales(parts, spec, shape)
    codes = spec.packer.unpack(parts["codes"], spec.bits, shape[-1] // spec.vector)
    return combine(levels(codes, spec), scale, zero, spec).to(dtype)


def combine(level: Tensor, scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> Tensor:
    """Apply scales and zeros to levels [..., out, in]: the equation of `WeightSpec`."""
    if spec.rows == 1 and level.shape[-1] % scale.shape[-1] == 0:
        grouped = level.unflatten(-1, (scale.shape[-1], -1))
        return _affine(grouped, scale.unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), spec).flatten(-2)
    spread = [None if s is None else _spread(s, spec, level.shape) for s in (scale, zero)]
    assert spread[0] is not None
    return _affine(level, spread[0], spread[1], spec)


def _affine(level: Tensor, scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> Tensor:
    if zero is None:
        return level * scale
    return level * scale - zero if spec.zero == "min" else (level - zero) * scale


def _spread(scale: Tensor, spec: WeightSpec, shape: Sequence[int]) -> Tensor:
    """Repeat a scale matrix to one entry per weight."""
    out_features, in_features = shape[-2:]
    wide = scale.repeat_interleave(spec.group or in_features, dim=-1)[..., :in_features]
    return _by_row(wide, spec, out_features)
