"""Rows of stored weights, chosen or put one below the other without decoding a code."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ptqc.errors import SpecError
from ptqc.spec import ScaleSpec, WeightSpec
from ptqc.storage import Parts, decode_scales

__all__ = ["concat", "concat_spec", "index", "take"]


def take(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int], dim: int, at: Tensor | slice | int
         ) -> tuple[Parts, WeightSpec] | None:  # fmt: skip
    """Parts and spec of the weight indexed along a dimension other than `in`; None if the spec cannot say it.

    Nested scales whose blocks end with the rows stay as they are; others come out as plain float32 ones, which hold
    the same values.
    """
    if dim == len(shape) - 1 or (spec.rows != 1 and dim == len(shape) - 2):
        return None
    if isinstance(at, int) and dim != 0:
        return None
    if not spec.scale.is_nested:
        return {name: index(part, dim, at) for name, part in parts.items()}, spec
    per_row, rest = divmod(spec.groups(shape)[1], spec.scale.block or 1)
    if not spec.scale.dynamic and spec.rows == 1 and rest == 0:
        rows = (*shape[:-1], per_row)
        return {
            name: index(part.view(rows), dim, at).flatten() if name.endswith("_outer") else index(part, dim, at)
            for name, part in parts.items()
        }, spec
    scale, zero = decode_scales(parts, spec, shape)
    taken = {"codes": index(parts["codes"], dim, at), "scale": index(scale, dim, at)}
    if spec.zero != "none":
        taken["zero"] = index(parts["zero"] if spec.zero == "int" or zero is None else zero, dim, at)
    return taken, _flat(spec)


def index(part: Tensor, dim: int, at: Tensor | slice | int) -> Tensor:
    """One part or extra, indexed along an axis that it has."""
    # Operators, not part[...]: Python indexing below the autograd keys fails in inference mode (torch 2.13).
    if isinstance(at, Tensor):
        return part.index_select(dim, at)
    if isinstance(at, slice):
        piece: Tensor = torch.ops.aten.slice.Tensor(part, dim, at.start, at.stop, at.step or 1)
        return piece
    return part.select(dim, at)


# -------------------------------------------------------------------- weights one below the other


def concat_spec(spec: WeightSpec, outs: Sequence[int], in_features: int) -> WeightSpec | str:
    """The spec of the weight that weights [out, in] of one spec make one below the other, or why there is none.

    Scales that rows share must not be shared across the seams. Nested scales stay nested where their blocks end at the
    seams; else they become plain float32 ones, which hold the same values.
    """
    if len(outs) == 1:
        return spec
    if spec.rows is None:
        return f"{spec} has one scale for the whole weight"
    uneven = next((out for out in outs[:-1] if out % (spec.rows or 1)), None)
    if uneven is not None:
        return f"{spec} has a scale per {spec.rows} rows, which does not divide {uneven}"
    scales = [math.prod(spec.groups((out, in_features))) for out in outs[:-1]]
    is_ragged = any(count % (spec.scale.block or 1) for count in scales)
    return _flat(spec) if spec.scale.is_nested and (spec.scale.dynamic or is_ragged) else spec


def _flat(spec: WeightSpec) -> WeightSpec:
    """The spec with plain float32 scales."""
    return replace(spec, scale=ScaleSpec(dtype="f32"))


def concat(weights: Sequence[Mapping[str, Tensor]], spec: WeightSpec, in_features: int) -> Parts:
    """The parts, as `concat_spec` says, of weights [out, in] one below the other.

    A single weight comes back as it is, not copied. Raises: SpecError if they cannot be stored as one.
    """
    if len(weights) == 1:
        return dict(weights[0])
    outs = [parts["codes"].shape[0] for parts in weights]
    made = concat_spec(spec, outs, in_features)
    if isinstance(made, str):
        raise SpecError(f"{made}: these weights cannot be stored as one")
    if made != spec:
        shapes = [(out, in_features) for out in outs]
        taken = [take(parts, spec, shape, 0, slice(None)) for parts, shape in zip(weights, shapes, strict=True)]
        weights = [found[0] for found in taken if found is not None]
    return {name: _stacked([parts[name] for parts in weights]) for name in weights[0]}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].is_floating_point() and parts[0].element_size() == 1:  # torch concatenates no float8 (2.13)
        return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(list(parts))
