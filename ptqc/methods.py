"""What a quantization method is, and the step that every weight goes through, whatever the method.

A method is one file in `passes/methods/`: a frozen dataclass whose fields are its options. It sees one matrix (or a
stack of them) and statistics of its input, never a graph.
"""

import logging
import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ptqc import storage
from ptqc.errors import SpecError, WeightError
from ptqc.qtensor import QuantTensor
from ptqc.registry import Registry
from ptqc.spec import SCALE_DTYPES, WeightSpec
from ptqc.surroundings import Surroundings, check_extras, stored_matrix, stored_statistics

__all__ = ["METHODS", "Method", "hold_scales", "quantize_weight", "rows_at_once", "whole_row"]

log = logging.getLogger("ptqc")

_TRIVIAL = Surroundings()
_WEIGHTS_AT_ONCE = 1 << 22
"""Weights handled at a time where rows are independent: bounds the float32 temporaries to a few times 16 MB."""


class Method(Protocol):
    """Chooses the codes of one weight."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics of the input that `choose` reads; empty for methods that need no data.

        Of an instance: options may decide. Where they do not, a class variable is enough.
        """
        ...

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        """The spec for a request; None asks for the method's default, group -1 for the whole row.

        Raises: SpecError for a width the method cannot do.
        """
        ...

    def refuses(self, spec: WeightSpec) -> str | None:
        """None if the method can choose codes for `spec`, else the reason and what would work."""
        ...

    def choose(self, weight: Tensor, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
        """Choose codes, scales and zeros. weight: [..., out, in] float32, finite; not changed."""
        ...


METHODS: Registry[type[Method]] = Registry("method", "ptqc.passes.methods")


def quantize_weight(
    weight: Tensor,
    method: Method,
    spec: WeightSpec,
    *,
    name: str = "weight",
    is_transposed: bool = False,
    statistics: Mapping[str, Tensor] | None = None,
    surroundings: Surroundings = _TRIVIAL,
    extras: Mapping[str, Tensor] | None = None,
) -> QuantTensor:
    """Quantize one weight.

    weight: [..., out, in] of any float dtype, or [..., in, out] with is_transposed. name: for messages. statistics: of
    its input. surroundings, extras: what shall be done around the stored matrix; weight and statistics are given
    without, and carried over here. Scales that float16 cannot hold are stored as float32 instead. The result has the
    weight's own shape and dtype.

    Raises: WeightError for NaN or infinite values; SpecError if the spec does not fit the shape or the method, or the
    extras do not fit the surroundings.
    """
    _check(weight, name)
    extras = extras or {}
    matrix = weight.detach().mT if is_transposed else weight.detach()
    try:
        spec.groups(matrix.shape)
        check_extras(surroundings, extras, matrix.shape)
    except SpecError as error:
        raise SpecError(f'cannot store "{name}" as {spec}: {error}') from None
    with torch.no_grad():
        matrix = stored_matrix(matrix, surroundings, extras)
        statistics = stored_statistics(statistics or {}, surroundings, extras)
    spec = hold_scales(spec, float(matrix.abs().amax()), name)
    reason = method.refuses(spec)
    if reason is not None:
        raise SpecError(f'"{name}": {reason}')
    with torch.no_grad():
        logical = _choose(matrix, method, spec, statistics)
    return QuantTensor.from_codes(logical, spec, weight.dtype, is_transposed, surroundings, extras)


def _check(weight: Tensor, name: str) -> None:
    if not weight.is_floating_point() or weight.ndim < 2:
        shape = tuple(weight.shape)
        raise WeightError(f'"{name}" is {weight.dtype} of shape {shape}; only float matrices are quantized')
    if weight.numel() == 0:
        raise WeightError(f'"{name}" has shape {tuple(weight.shape)}: nothing to quantize')
    # amax carries NaN and infinity through, one pass and no mask of the weight's size.
    low, high = weight.detach().aminmax()
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        bad = weight.numel() - int(torch.isfinite(weight.detach()).sum())
        raise WeightError(
            f'"{name}" holds {bad} NaN or infinite values of {weight.numel()}; '
            "repair the checkpoint or leave this weight out (exclude)"
        )


def hold_scales(spec: WeightSpec, magnitude: float, name: str) -> WeightSpec:
    """The spec with float32 scales if its own scale type would overflow or lose all precision.

    magnitude: of the largest weight.

    Raises: SpecError if these scales are themselves quantized: such formats have no float32 variant.
    """
    dtype = SCALE_DTYPES[spec.scale.dtype]
    if dtype not in (torch.float16, torch.float8_e4m3fn):
        return spec
    largest = spec.book.largest if spec.book else 2 ** (spec.bits - 1) - 1 or 1
    scale = magnitude / largest
    info = torch.finfo(dtype)
    fits = info.tiny <= scale and 2 * scale <= info.max and (spec.zero != "min" or magnitude <= info.max)
    if magnitude == 0 or fits:
        return spec
    if spec.scale.bits is not None:
        raise SpecError(
            f'"{name}": the {spec.scale.dtype} scales of {spec} do not hold weights near {magnitude:.1e}; '
            f"use plain scales, such as int{spec.bits}g{spec.group}"
        )
    log.info('"%s": scales near %.1e do not fit %s, stored as float32', name, scale, spec.scale.dtype)
    return spec.with_scale_dtype("f32")


def rows_at_once(method: Method, spec: WeightSpec, in_features: int) -> int | None:
    """How many rows a method is given at a time; None if it has to see the whole weight."""
    rows_are_independent = spec.rows == 1 and spec.scale.bits is None and not method.needs
    return max(1, _WEIGHTS_AT_ONCE // in_features) if rows_are_independent else None


def _choose(matrix: Tensor, method: Method, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
    step = rows_at_once(method, spec, matrix.shape[-1])
    if step is None or matrix.numel() <= _WEIGHTS_AT_ONCE:
        return method.choose(matrix.float().contiguous(), spec, statistics)
    flat = matrix.reshape(-1, matrix.shape[-1])
    pieces = [method.choose(rows.float(), spec, statistics) for rows in flat.split(step)]
    lead = matrix.shape[:-1]
    zero = None if pieces[0].zero is None else torch.cat([p.zero for p in pieces if p.zero is not None])
    return storage.Codes(
        torch.cat([p.codes for p in pieces]).unflatten(0, lead),
        torch.cat([p.scale for p in pieces]).unflatten(0, lead),
        None if zero is None else zero.unflatten(0, lead),
    )


def whole_row(group: int | None, default: int | None) -> int | None:
    """Read a requested group: None is the default, -1 the whole row (None in a spec)."""
    if group is None:
        return default
    return None if group == -1 else group
