"""From the stored parts of a weight to the bytes that a kernel reads in order.

    codes     [n / 16][padded / 4c][16 columns x 4 inputs]    c codes of 8 / c bits to a byte: bits j hold input 4j + i
    scales    [n / 16][groups][16]    float16 times a power of two per column, or float32 where values must be exact
    offsets   likewise: what is subtracted, per unit of the sum of the inputs (zeros and minima)
    columns   [n] float32: what is multiplied at the end; all of the scale where a row has only one

One load of 64 bytes then serves 16 outputs, whose sums stay in the lanes of a register, and everything that one column
block needs is contiguous. With a gate, columns of its two halves alternate by the lanes of a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqc import storage
from ptqc.codegen.cpp.blocks import Blocks
from ptqc.codegen.cpp.levels import Level
from ptqc.codegen.cpp.pages import in_large_pages
from ptqc.spec import WeightSpec

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

    def _rows(self) -> Tensor:
        """The row of the weight behind each column, [padded]; -1 for padding."""
        rows = torch.full((self.padded,), -1)
        column = torch.arange(self.n)
        if self.is_gated:
            half = self.n // 2
            part, at = column // half, column % half
            column = (2 * (at // self.lanes) + part) * self.lanes + at % self.lanes
        rows[column] = torch.arange(self.n)
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

    def _levels(self, codes: Tensor) -> Tensor:
        """Codes of the kernel [rows, k] uint8 from stored ones [rows, bytes]."""
        spec, k = self.spec, self.blocks.k
        unpacked = spec.packer.unpack(codes, spec.bits, k // spec.vector)
        book = spec.book
        if book is None or book.lattice is None:
            return unpacked
        points = book.lattice.points(unpacked).flatten(-2)
        return ((points / self.level.unit).round_() + self.level.centre).to(torch.uint8)

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


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """The rows of a matrix; zeros for -1."""
    taken = values[rows.clamp_min(0)]
    taken[rows < 0] = 0
    return taken


def _by_columns(values: Tensor) -> Tensor:
    """[n, groups] as [n / 16, groups, 16]."""
    return values if values.numel() == 0 else values.view(-1, COLUMNS, values.shape[1]).transpose(1, 2).contiguous()
