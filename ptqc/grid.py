"""Scales from the range of a group, and codes from scales: the arithmetic every method shares.

All functions take weights [..., out, in] and give scales and zeros [..., out // rows, in // group], as `storage.Codes`
wants them.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc import storage
from ptqc.codebooks import nearest_codes
from ptqc.spec import WeightSpec

__all__ = ["choose_codes", "extremes", "group_error", "reconstruct", "tiles", "untile"]


def tiles(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Cut a weight into the groups that share a scale: [..., out // rows, in // group, rows * group].

    Partial blocks at the right and the bottom are filled with zeros.
    """
    scale_rows, columns = spec.groups(weight.shape)
    out_features, in_features = weight.shape[-2:]
    group, rows = spec.group or in_features, spec.rows or out_features
    if rows == 1:
        grouped: Tensor = weight.unflatten(-1, (columns, group))
        return grouped
    filled = pad(weight, (0, columns * group - in_features, 0, scale_rows * rows - out_features))
    blocks: Tensor = filled.unflatten(-1, (columns, group)).unflatten(-3, (scale_rows, rows))
    return blocks.transpose(-3, -2).flatten(-2)


def untile(tiled: Tensor, spec: WeightSpec, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Invert `tiles`: put the groups back into a weight of `shape`, dropping the filling."""
    out_features, in_features = shape[-2:]
    group, rows = spec.group or in_features, spec.rows or out_features
    if rows == 1:
        return tiled.flatten(-2)
    blocks: Tensor = tiled.unflatten(-1, (rows, group)).transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return blocks[..., :out_features, :in_features]


def extremes(weight: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every group."""
    groups = tiles(weight, spec)
    return groups.amin(-1), groups.amax(-1)  # aminmax takes four times as long along an axis (torch 2.13, CPU)


def choose_codes(weight: Tensor, scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> Tensor:
    """The nearest code of every weight, given scales and zeros as they will be read back.

    weight: [..., out, in] float32. Returns [..., out, in] uint8, or float8 where the codebook is a float type;
    [..., out, in // vector] int64 where codes are wider than 8 bits.
    """
    groups = tiles(weight, spec)
    step = scale.unsqueeze(-1)
    # The inverse of a denormal scale is infinite, and infinity times a weight of zero is NaN: such groups are zero.
    inverse = torch.where(step.abs() < torch.finfo(torch.float32).tiny, 0.0, 1.0 / step)
    offset = 0.0 if zero is None else zero.unsqueeze(-1)
    level = (groups + offset) * inverse if spec.zero == "min" else groups * inverse + offset
    if spec.vector > 1:
        return _nearest_vectors(untile(level, spec, weight.shape), spec)
    return untile(_nearest(level, spec), spec, weight.shape)


def _nearest_vectors(level: Tensor, spec: WeightSpec) -> Tensor:
    assert spec.book is not None and spec.book.lattice is not None
    codes, _ = spec.book.lattice.nearest(level.unflatten(-1, (-1, spec.vector)))
    return codes


def _nearest(level: Tensor, spec: WeightSpec) -> Tensor:
    book = spec.book
    if book is not None and book.float_dtype is not None:
        return level.clamp(-book.largest, book.largest).to(book.float_dtype)
    if book is not None:
        return nearest_codes(level, book.table(level.device))
    centre = 2 ** (spec.bits - 1) if spec.is_symmetric else 0
    return (level.round_() + centre).clamp_(0, 2**spec.bits - 1).to(torch.uint8)


def reconstruct(logical: storage.Codes, spec: WeightSpec) -> Tensor:
    """The weight [..., out, in] float32 that codes, scales and zeros stand for once they are stored."""
    scale, zero = storage.round_scale(logical.scale, spec), logical.zero
    if zero is not None and spec.zero != "int":
        zero = storage.round_scale(zero, spec, zero_minimum=True)
    return storage.combine(storage.levels(logical.codes, spec), scale, zero, spec)


def group_error(weight: Tensor, logical: storage.Codes, spec: WeightSpec) -> Tensor:
    """Squared error of every group, [..., out // rows, in // group]."""
    return tiles(reconstruct(logical, spec) - weight, spec).square().sum(-1)
