"""From the stored parts of a weight to the bytes that a kernel reads in order.

    codes     [n / 16][padded / 4c][16 columns x 4 inputs]    c codes of 8 / c bits to a byte: bits j hold input 4j + i
    scales    [n / 16][groups][16]    float16 times a power of two per column, or float32 where values must be exact
    offsets   likewise: what is subtracted, per unit of the sum of the inputs (zeros and minima)
    columns   [n] float32: what is multiplied at the end; all of the scale where a row has only one

Codes come back from this exactly (`restore`), scales where float16 has held all of their bits. One load of 64 bytes
serves 16 outputs, whose sums stay in the lanes of a register, and everything that one column block needs is contiguous.
With a gate, columns of its two halves alternate by the lanes of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ptqc import storage
from ptqc.codegen.cpp.blocks import Blocks
from ptqc.codegen.cpp.levels import Level
from ptqc.codegen.cpp.pages import in_large_pages
from ptqc.lattice import Lattice
from ptqc.spec import SCALE_DTYPES, WeightSpec

__all__ = ["COLUMNS", "Layout"]

COLUMNS = 16
"""Outputs of a column block."""
_AT_ONCE = 1024
"""Rows unpacked at a time, so that preparing needs little memory."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything goes.

    tile: outputs that a kernel computes at a time, a multiple of 16. lanes: of a vector. is_gated: halves alternate.
    is_exact: scales stay float32. is_signed: bytes hold level - 128, for instructions that take signed weights only.
    """

    spec: WeightSpec
    level: Level
    blocks: Blocks
    n: int
    tile: int
    lanes: int
    is_gated: bool
    is_exact: bool
    is_signed: bool

    @property
    def padded(self) -> int:
        """Columns with their padding."""
        half = -(-(self.n // 2) // self.lanes) * self.lanes
        n = 2 * half if self.is_gated else self.n
        return -(-n // self.tile) * self.tile

    def prepare(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Codes, scales, offsets and columns; what the kernel does not read is empty."""
        named = dict(zip(storage.part_names(self.spec), parts, strict=True))
        rows = self._rows()
        scale, offset = self._scales(named)
        scales, offsets, columns = self._split(_take(scale, rows), None if offset is None else _take(offset, rows))
        return [self._codes(named["codes"], rows), _by_columns(scales), _by_columns(offsets), columns]

    @property
    def restorable(self) -> tuple[str, ...]:
        """Codes, unless they are sums of points; scales where a row of the weight has its own, and they are numbers."""
        spec = self.spec
        if spec.book is not None and spec.book.lattice is not None and not spec.book.lattice.is_unique:
            return ()
        return ("codes",) if spec.rows != 1 or spec.scale.bits is not None else ("codes", "scale")

    def restore(self, name: str, prepared: Sequence[Tensor], first: int, rows: int) -> Tensor:
        """The codes or scales of rows [first, first + rows)."""
        codes, scales, _, factors = prepared
        columns = self._columns()[first : first + rows]
        if name == "codes":
            return self._restored_codes(codes, columns)
        scale = factors[columns, None] if scales.numel() == 0 else _rows_of(scales, columns).float()
        scale = scale if scales.numel() == 0 else scale * factors[columns, None]
        return (scale / self.level.unit).to(SCALE_DTYPES[self.spec.scale.dtype])

    def cut(self, prepared: Sequence[Tensor], first: int, piece: object) -> list[Tensor] | None:
        """Column blocks lie one behind the other, so those of a piece that begins with one are a view."""
        if piece == self and first == 0:
            return list(prepared)
        if not isinstance(piece, Layout) or first % COLUMNS or self.is_gated:
            return None
        alike = replace(self, n=piece.n, spec=replace(self.spec, scale=piece.spec.scale))
        if alike != piece or first + piece.padded > self.padded:
            return None
        blocks = slice(first // COLUMNS, (first + piece.padded) // COLUMNS)
        *by_block, factors = (*prepared[:3], prepared[3][first : first + piece.padded])
        return [*(part[blocks] if part.numel() else part for part in by_block), factors]

    def stacked(self, count: int) -> "Layout | None":
        """Without padding, weights one below the other are column blocks one behind the other."""
        return None if self.is_gated or self.padded != self.n else replace(self, n=self.n * count)

    def _columns(self) -> Tensor:
        """The column of each row of the weight, [n]."""
        column = torch.arange(self.n)
        if self.is_gated:
            half = self.n // 2
            part, at = column // half, column % half
            column = (2 * (at // self.lanes) + part) * self.lanes + at % self.lanes
        return column

    def _rows(self) -> Tensor:
        """The row of the weight behind each column, [padded]; -1 for padding."""
        rows = torch.full((self.padded,), -1)
        rows[self._columns()] = torch.arange(self.n)
        return rows

    def _codes(self, codes: Tensor, rows: Tensor) -> Tensor:
        c, wide = self.level.per_byte, self.blocks.padded
        packed = in_large_pages(self.padded // COLUMNS, wide // (4 * c), COLUMNS, 4, dtype=torch.uint8)
        for first in range(0, self.padded, _AT_ONCE):
            slab = rows[first : first + _AT_ONCE]
            unpacked = self._levels(_take(codes.view(torch.uint8), slab))
            unpacked = unpacked ^ 0x80 if self.is_signed and not self.level.table else unpacked
            spread = self.blocks.pad(unpacked).view(-1, COLUMNS, wide // (4 * c), c, 4)
            out = packed[first // COLUMNS : (first + len(slab)) // COLUMNS]
            out.copy_(spread[:, :, :, 0].transpose(1, 2))
            for j in range(1, c):
                out |= spread[:, :, :, j].transpose(1, 2) << (self.level.width * j)
        return packed

    def _restored_codes(self, packed: Tensor, columns: Tensor) -> Tensor:
        """Stored codes of some columns: `_codes` backwards."""
        spec, c, mask = self.spec, self.level.per_byte, 2**self.level.width - 1
        shape, dtype = storage.part_layout(spec, (len(columns), self.blocks.k))["codes"]
        restored = torch.empty(shape, dtype=torch.uint8)
        for first in range(0, len(columns), _AT_ONCE):
            slab = columns[first : first + _AT_ONCE]
            rows = _rows_of(packed, slab)  # [rows, padded / 4c, 4]
            spread = torch.stack([rows >> self.level.width * j & mask for j in range(c)], 2) if c > 1 else rows
            unpacked = self.blocks.unpad(spread.reshape(len(slab), -1))
            unpacked = unpacked ^ 0x80 if self.is_signed and not self.level.table else unpacked
            restored[first : first + len(slab)] = spec.packer.pack(self._stored(unpacked), spec.bits)
        return restored.view(dtype)

    def _levels(self, codes: Tensor) -> Tensor:
        """Codes of the kernel [rows, k] uint8 from stored ones [rows, bytes]."""
        spec, k = self.spec, self.blocks.k
        unpacked = spec.packer.unpack(codes, spec.bits, k // spec.vector)
        book = spec.book
        if book is None or book.lattice is None:
            return unpacked
        if self.level.table:
            return _codes_by_code(book.lattice, self.level)[unpacked].flatten(-2)
        return _steps(book.lattice.points(unpacked), self.level).flatten(-2)

    def _stored(self, codes: Tensor) -> Tensor:
        """Codes of the spec from those of the kernel: `_levels` backwards."""
        book = self.spec.book
        if book is None or book.lattice is None:
            return codes
        steps = torch.tensor(self.level.table, dtype=torch.float32)[codes.int()] - self.level.centre
        return book.lattice.codes_of((steps * self.level.unit).unflatten(-1, (-1, 8)))

    def _scales(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets [n, groups] float32."""
        spec = self.spec
        scale, zero = storage.row_scales(parts, spec, (self.n, self.blocks.k))
        offset = zero if zero is None or spec.zero == "min" else scale * zero
        return scale * self.level.unit, offset

    def _split(self, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and offset of each group, and the factor of each column that stands outside of both."""
        none = scale.new_empty(0)
        if self.blocks.groups == 1 and offset is None:
            return none, none, scale[:, 0].contiguous()
        if self.is_exact:
            return scale, none if offset is None else offset, torch.ones(len(scale))
        largest = scale.abs().amax(1) if offset is None else torch.maximum(scale.abs(), offset.abs()).amax(1)
        # Values just below 2**15: what float16 scales hold, it holds again, and the small ones keep their bits.
        power = torch.where(largest > 0, 14 - largest.clamp_min(1e-37).log2().floor(), 0.0).clamp(-120, 120)
        factor = torch.exp2(power)
        halves = [none if value is None else (value * factor[:, None]).half() for value in (scale, offset)]
        return halves[0], halves[1], 1 / factor


def _steps(points: Tensor, level: Level) -> Tensor:
    return ((points / level.unit).round_() + level.centre).to(torch.uint8)


@cache
def _codes_by_code(lattice: Lattice, level: Level) -> Tensor:
    """The kernel's codes of eight weights by code of a lattice, [2**bits, 8] uint8."""
    steps = _steps(lattice.points(torch.arange(1 << lattice.bits)), level)
    code_of = torch.zeros(256, dtype=torch.uint8)
    code_of[list(level.table)] = torch.arange(len(level.table), dtype=torch.uint8)
    return code_of[steps.int()]


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """The rows of a matrix; zeros for -1."""
    taken = values[rows.clamp_min(0)]
    taken[rows < 0] = 0
    return taken


def _rows_of(blocks: Tensor, columns: Tensor) -> Tensor:
    """Values [columns, groups, ..] of some columns. blocks: [n / 16, groups, 16, ..], read where columns lie alone."""
    first, last = int(columns.min()) // COLUMNS, int(columns.max()) // COLUMNS
    return blocks[first : last + 1].movedim(2, 1).flatten(0, 1)[columns - first * COLUMNS]


def _by_columns(values: Tensor) -> Tensor:
    """[n, groups] as [n / 16, groups, 16]."""
    return values if values.numel() == 0 else values.view(-1, COLUMNS, values.shape[1]).transpose(1, 2).contiguous()
