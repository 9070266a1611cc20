"""Stored weights as codes that ordinary operators of the graph decode: what no operator of its own holds.

    level = codes, or the levels or points that they stand for (Gather), those of several stages added
    numbers = (level - zero) * scale, or level * scale - minimum, one scale for a block of rows and inputs

in float32 and in the order of `ptqc.storage`, so that the numbers are the same. Codes of up to 4 bits are UINT4.
Points of lattices are multiples of a quarter and lie in the file once, as int8. Runtimes that compute constants when
they load a file hold the numbers from then on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor

from ptqc import storage
from ptqc.codegen.export._onnx_forms import float8_codes, rounded_scale
from ptqc.spec import WeightSpec

__all__ = ["Coded", "coded"]

Array = np.ndarray[Any, Any]
Constant = Callable[[str, Any], ir.Value]
"""Makes a constant, by name and value; those named "ptqc." are of no weight, and shared."""
_QUARTERS = 4
_FLOAT, _INT32 = int(ir.DataType.FLOAT), int(ir.DataType.INT32)


@dataclass(frozen=True, eq=False)
class Stage:
    """codes [..., out, in // vector]. table: [levels] float32, or [levels, 8] int8 in units of `unit`; None where codes
    are numbers. name: of the table."""

    codes: Array
    table: Array | None = None
    name: str = ""
    unit: float = 1.0


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight of `shape` [..., out, in]. scale, zero: [..., out // rows, 1, blocks, 1]; zero may be a number."""

    shape: tuple[int, ...]
    stages: tuple[Stage, ...]
    scale: Array
    zero: Array | float | None
    is_minimum: bool

    def decoded(self, tape: ir.tape.Tape, constant: Constant) -> ir.Value:
        """Operators from constants to numbers [..., out, in] float32."""
        level = None
        for number, stage in enumerate(self.stages):
            one = self._level(tape, stage, number, constant)
            level = one if level is None else tape.op("Add", [level, one])
        *lead, out_features, in_features = self.shape
        rows, _, blocks, _ = self.scale.shape[-4:]
        grouped = (*lead, rows, out_features // rows, blocks, in_features // blocks)
        made = tape.op("Reshape", [level, _sizes(constant, grouped)])
        zero = None if self.zero is None else self._float(tape, constant("zero", self.zero))
        scale = self._float(tape, constant("scale", self.scale))
        if zero is not None and not self.is_minimum:
            made = tape.op("Sub", [made, zero])
        made = tape.op("Mul", [made, scale])
        if zero is not None and self.is_minimum:
            made = tape.op("Sub", [made, zero])
        return tape.op("Reshape", [made, _sizes(constant, self.shape)])

    @staticmethod
    def _level(tape: ir.tape.Tape, stage: Stage, number: int, constant: Constant) -> ir.Value:
        codes = constant(f"codes{number or ''}", stage.codes)
        if stage.table is None:
            return tape.op("Cast", [codes], {"to": _FLOAT})
        table = constant(f"ptqc.{stage.name}", stage.table)
        found = tape.op("Gather", [table, tape.op("Cast", [codes], {"to": _INT32})])
        if stage.table.dtype == np.float32:
            return found
        unit = constant(f"ptqc.unit.{stage.unit:g}", stage.unit / _QUARTERS)
        return tape.op("Mul", [tape.op("Cast", [found], {"to": _FLOAT}), unit])

    @staticmethod
    def _float(tape: ir.tape.Tape, value: ir.Value) -> ir.Value:
        return value if value.dtype == ir.DataType.FLOAT else tape.op("Cast", [value], {"to": _FLOAT})


def _sizes(constant: Constant, sizes: Sequence[int]) -> ir.Value:
    return constant(f"ptqc.shape.{'x'.join(map(str, sizes))}", np.array(sizes))


def coded(parts: Mapping[str, Tensor], spec: WeightSpec, shape: Sequence[int]) -> Coded | str:
    """The weight [..., out, in] of these parts, or why its codes cannot be decoded in a graph."""
    scale, zero = storage.decode_scales(parts, spec, shape)
    lead, (out_features, in_features), (rows, blocks) = shape[:-2], shape[-2:], scale.shape[-2:]
    if out_features % rows or in_features % blocks or (spec.rows or out_features) * rows != out_features:
        return "its blocks do not divide its rows and columns"
    sizes = (*lead, rows, 1, blocks, 1)
    offset = float(2 ** (spec.bits - 1)) if spec.is_symmetric and spec.book is None else None
    zeros = None if zero is None else rounded_scale(zero, spec) if spec.zero != "int" else zero
    held = offset if zeros is None else zeros.view(sizes).numpy()
    return Coded(
        tuple(shape), _stages(parts, spec, in_features), rounded_scale(scale, spec).view(sizes).numpy(), held,
        spec.zero == "min",
    )  # fmt: skip


def _stages(parts: Mapping[str, Tensor], spec: WeightSpec, in_features: int) -> tuple[Stage, ...]:
    book = spec.book
    if book is not None and book.float_dtype is not None:
        return (Stage(float8_codes(parts["codes"])),)
    codes = spec.packer.unpack(parts["codes"], spec.bits, in_features // spec.vector).numpy()
    if book is None or book.lattice is None:
        stored = codes.astype(ml_dtypes.uint4 if spec.bits <= 4 else np.uint8)
        return (Stage(stored) if book is None else Stage(stored, book.table().numpy(), f"levels.{book.name}"),)
    stages, shift = [], 0
    for stage in book.lattice.stages:
        part = (codes >> shift) & ((1 << stage.bits) - 1)
        points = (stage.points() * _QUARTERS).astype(np.int8)
        name = f"points.{len(points)}"
        stages.append(Stage(part.astype(np.uint8 if stage.bits <= 8 else np.uint16), points, name, stage.unit))
        shift += stage.bits
    return tuple(stages)
