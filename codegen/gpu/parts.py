"""The stored parts of a weight in the form that kernels read (`ptqc.codegen.gpu.forms`), once per weight, and back.

A minimum becomes a zero in units of codes: scale * code - minimum = scale * (code - minimum / scale). Scales and zeros
of whole rows are float32. In groups they are float16, with a power of two taken out of the scales (of each output,
where the decoder applies them) so that none leaves its range, and lie in pairs in 32-bit words, since nothing narrower
is copied asynchronously:

    for each block (or group, if that is longer)    s_0 s_1 .. z_0 z_1 ..    two to a word    [rows, words, outputs]
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc import storage
from ptqc.codegen.gpu.forms import WeightForm
from ptqc.codegen.gpu.lattices import lattice_codes, lattice_tables, lattice_words
from ptqc.codegen.gpu.levels import byte_planes, whole_levels
from ptqc.codegen.gpu.scaled import SMALLEST, centred_bytes
from ptqc.codegen.gpu.words import pack_words, unpack_words
from ptqc.spec import WeightSpec

__all__ = [
    "OUTPUT_STEP",
    "codes_of_words",
    "logical_parts",
    "pack_parts",
    "pack_scales",
    "padded",
    "scales_of",
]

OUTPUT_STEP = 128
"""Outputs are filled up to a multiple of this."""

_FARTHEST_ZERO = 32768.0
"""A zero farther from the codes than this (in steps) leaves nothing of them in 16 bits."""

_SMALLEST_SCALE = 2.0**-100
"""Outputs whose scales are all smaller are taken for zero, or nearly so."""


def padded(outputs: int) -> int:
    """Outputs of a weight once it is filled up."""
    return -(-outputs // OUTPUT_STEP) * OUTPUT_STEP


def pack_parts(parts: Sequence[Tensor], form: WeightForm, shape: tuple[int, int], is_interleaved: bool) -> list[Tensor]:
    """The stored parts of a weight of `shape` [out, in] in the form that kernels read, in the order of `pointers`.

    is_interleaved: rows of the two halves take turns, for gates.
    """
    codes, scale, zero = logical_parts(parts, form.spec, shape, is_interleaved)
    outputs = padded(shape[0])
    pack = pack_words if form.stride == 1 else lattice_words
    found = {"w_ptr": pack(codes, form.layout, outputs)} | _tables(form, codes.device)
    found |= pack_scales(scale * form.factor, zero, form, shape[1])
    return [found[name] for name in form.pointers]


def codes_of_words(words: Tensor, form: WeightForm, outputs: Tensor, count: int) -> Tensor:
    """The codes of some outputs, `count` to each: what `pack_parts` has packed."""
    unpack = unpack_words if form.stride == 1 else lattice_codes
    return unpack(words, form.layout, outputs, count)


def logical_parts(
    parts: Sequence[Tensor], spec: WeightSpec, shape: tuple[int, int], is_interleaved: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [out, in // vector] uint8 or int64, scale and zero [out, in // group] float32, the latter in codes."""
    named = dict(zip(storage.part_names(spec), parts, strict=True))
    codes = spec.packer.unpack(named["codes"], spec.bits, shape[1] // spec.vector)
    if codes.dtype not in (torch.uint8, torch.int64):
        codes = codes.view(torch.uint8)
    scale, zero = storage.row_scales(named, spec, shape)
    if is_interleaved:
        order = torch.arange(shape[0], device=codes.device).view(2, -1).T.flatten()
        codes, scale, zero = codes[order], scale[order], None if zero is None else zero[order]
    if spec.zero == "min" and zero is not None:
        return storage.minimum_as_zero(codes, scale, zero, _FARTHEST_ZERO)
    return codes, scale, zero


def pack_scales(scale: Tensor, zero: Tensor | None, form: WeightForm, inputs: int) -> dict[str, Tensor]:
    """Scales and zeros by the names of their pointers."""
    outputs = padded(len(scale))
    if form.fields_per_scale is None:
        zeros = {} if zero is None else {"z_ptr": _transposed(zero, outputs)}
        return {"s_ptr": _transposed(scale, outputs)} | zeros
    words, norm = _scale_words(scale, zero, form, inputs, outputs)
    return {"s_ptr": words, "norm_ptr": norm}


def _transposed(scale: Tensor, outputs: int) -> Tensor:
    return pad(scale, (0, 0, 0, outputs - len(scale))).T.contiguous()


def _scale_words(
    scale: Tensor, zero: Tensor | None, form: WeightForm, inputs: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Scales and zeros [out, in // group] as words [rows * words, outputs] int32; what outputs are multiplied by."""
    norm = scale.new_ones(1, 1)
    if form.half is not None:
        # The largest scale goes to 2^14 .. 2^15; no bit of others changes unless they are 2^24 smaller.
        largest = scale.abs().amax(1, keepdim=True) if form.is_scaled else scale.abs().amax().view(1, 1)
        norm = torch.exp2(largest.clamp_min(_SMALLEST_SCALE).log2().floor() - 14)
        scale = (scale / norm).to(torch.float16).float()
    if form.is_scaled:
        zero = None if zero is None else zero * scale * -SMALLEST
        norm = norm / SMALLEST
    rows = -(-inputs // form.inputs_per_row)
    starts = torch.arange(rows * form.scales_per_row, device=scale.device) * (
        form.inputs_per_row // form.scales_per_row
    )
    groups = (starts // (form.spec.group or inputs)).clamp_max(scale.shape[1] - 1)
    numbers = [scale] if zero is None else [scale, zero]
    spread = [number[:, groups].unflatten(1, (rows, form.scales_per_row)) for number in numbers]
    spread[0] = spread[0] * scale.new_tensor(form.scale_steps)
    listed = torch.cat(spread, 2)
    if form.half is None:
        words = listed.view(torch.int32)
    else:
        words = pad(listed, (0, listed.shape[2] % 2)).to(torch.float16).view(torch.int32)
    return _transposed(words.flatten(1), outputs), (_transposed(norm, outputs) if form.is_scaled else norm).flatten()


def scales_of(named: Mapping[str, Tensor], form: WeightForm, inputs: int) -> Tensor:
    """Scales [outputs with padding, in // group] float32 by the names of their pointers: `pack_scales` backwards."""
    words = named["s_ptr"].T.contiguous()
    if form.fields_per_scale is None:
        return words / form.factor
    listed = words.view(torch.float32 if form.half is None else torch.float16)
    rows = listed.unflatten(1, (-(-inputs // form.inputs_per_row), -1))[:, :, : form.scales_per_row]
    rows = (rows.float() / rows.new_tensor(form.scale_steps, dtype=torch.float32)).flatten(1)
    step, group = form.inputs_per_row // form.scales_per_row, form.spec.group or inputs
    firsts = torch.arange(0, inputs, group, device=words.device) // step
    norm = named["norm_ptr"][:, None] * (SMALLEST if form.is_scaled else 1.0)
    scales: Tensor = rows[:, firsts] * norm / form.factor
    return scales


def _tables(form: WeightForm, device: torch.device) -> dict[str, Tensor]:
    book = form.spec.book
    if book is None or not form.tables:
        return {}
    if book.lattice is not None:
        return {name: table.to(device) for name, table in lattice_tables(book.lattice).items()}
    levels = pad(book.table(device), (0, 16 - len(book.levels)))
    if form.half is None:
        return {"levels_ptr": levels}
    whole = whole_levels(book.levels)
    if form.is_scaled and whole is not None:
        return {"planes_ptr": torch.tensor(centred_bytes(whole.levels), device=device)}
    return {"planes_ptr": torch.tensor(byte_planes(book.levels, form.half), device=device)}
