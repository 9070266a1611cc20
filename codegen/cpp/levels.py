"""What a stored code stands for inside a kernel: an 8-bit integer times a unit, or exactly a float.

    integer kernels    w = unit * (level - centre) * scale - offset,  level an integer of at most 8 bits
    float kernels      the same with exact levels: integers, a table of floats, or float8

A level is the code itself, or is looked up in a table of 16 bytes. Codebooks whose levels are no multiples of a common
unit (nf4, fp4) are rounded to the unit that costs least; lattices are looked up once, when the weight is prepared, and
become integers of their own.
"""

from dataclasses import dataclass
from functools import cache

import torch

from ptqc.codebooks import Codebook
from ptqc.spec import WeightSpec

__all__ = ["Level", "exact_level", "integer_level"]

_LARGEST = 127
_TABLE = 16
"""Levels that a shuffle looks up."""


@dataclass(frozen=True, slots=True)
class Level:
    """How the level of a code is found.

    width: bits of a code in the kernel's layout (1, 2, 4, 8). centre: subtracted from the level. unit: multiplied into
    the scale. span: largest level. table: level of each code where it is not the code itself. floats: exact levels, for
    float kernels. float_bits: mantissa bits of a float8 code.
    """

    width: int
    centre: int
    span: int
    unit: float = 1.0
    table: tuple[int, ...] = ()
    floats: tuple[float, ...] = ()
    float_bits: int | None = None

    @property
    def per_byte(self) -> int:
        """Codes that share a byte."""
        return 8 // self.width

    @property
    def is_wide(self) -> bool:
        """True if levels need the eighth bit, which signed instructions do not leave them."""
        return self.span > _LARGEST


def integer_level(spec: WeightSpec) -> Level | None:
    """The levels of a spec as integers; None for float8, whose range no 8-bit integer has."""
    book = spec.book
    if book is None:
        return _affine(spec)
    if book.float_dtype is not None:
        return None
    levels = _lattice_levels(book) if book.lattice is not None else book.levels
    unit = _unit(levels)
    steps = [round(level / unit) for level in levels]
    centre = -min(steps)
    if book.lattice is not None and len(levels) > _TABLE:
        return Level(8, centre, max(steps) + centre, unit)
    table = tuple(step + centre for step in steps)
    width = 4 if book.lattice is not None else _width(spec.bits)
    if table == tuple(range(len(table))):
        return Level(width, centre, len(table) - 1, unit)
    return Level(width, centre, max(table), unit, table=table)


def exact_level(spec: WeightSpec) -> Level | None:
    """The levels of a spec without any rounding; None for lattices whose points have no common unit."""
    book = spec.book
    if book is None:
        return _affine(spec)
    if book.float_dtype is not None:
        return Level(8, 0, 255, float_bits={torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}[book.float_dtype])
    level = integer_level(spec)
    levels = _lattice_levels(book) if book.lattice is not None else book.levels
    if level is None or _misses(levels, level.unit) == 0:
        return level
    return None if book.lattice is not None else Level(level.width, 0, 0, floats=levels)


def _affine(spec: WeightSpec) -> Level:
    return Level(_width(spec.bits), 2 ** (spec.bits - 1) if spec.is_symmetric else 0, 2**spec.bits - 1)


def _width(bits: int) -> int:
    return next(width for width in (1, 2, 4, 8) if bits <= width)


def _misses(levels: tuple[float, ...], unit: float) -> float:
    """Squared distance of the levels from multiples of a unit."""
    missed = sum((level - round(level / unit) * unit) ** 2 for level in levels)
    return 0.0 if missed < 1e-12 * sum(level**2 for level in levels) else missed


@cache
def _unit(levels: tuple[float, ...]) -> float:
    """The largest unit whose multiples are the levels, at most 127 of them; else the one that misses them least."""
    largest = max(map(abs, levels))
    for steps in range(1, _LARGEST + 1):
        if _misses(levels, largest / steps) == 0:
            return largest / steps
    trials = [largest / (_LARGEST - step / 64) for step in range(20 * 64)]
    return min(trials, key=lambda unit: _misses(levels, unit))


@cache
def _lattice_levels(book: Codebook) -> tuple[float, ...]:
    """All values that a weight of a lattice may have."""
    assert book.lattice is not None
    values = torch.zeros(1)
    for stage in book.lattice.stages:
        points = torch.from_numpy(stage.points()).unique() * stage.unit
        values = (values[:, None] + points).flatten().unique()
    return tuple(values.tolist())
