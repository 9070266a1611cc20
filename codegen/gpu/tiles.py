"""Which tile for how many rows of input, into how many runs a product is split, and when a dense product is faster.

Looked up when a kernel is launched, from the number of rows at hand: no guards, no recompiles but for a tile that was
not used before.
"""

from dataclasses import dataclass, field
from functools import cache

import torch

from ptqc.codegen.gpu.words import FEWEST_ROWS, WordLayout

__all__ = ["Device", "Tile", "device_facts", "is_dense_better", "pieces_of", "split_of", "tile_for"]


@dataclass(frozen=True, slots=True)
class Tile:
    """rows, outputs: of the result that one program computes; inputs: of one step of its loop; warps, stages: as
    Triton takes them; registers: that a thread may use, where the assembler would rather spill than use them; pieces:
    in which a step takes its inputs, one after the other, so that fewer are in registers; programs: that are to be on
    a processor at a time, where few rows wait for memory."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    registers: int | None = None
    pieces: int = 1
    programs: int = field(default=2, repr=False)


@dataclass(frozen=True, slots=True)
class Device:
    """processors: streaming multiprocessors; flops: of 16-bit tensor cores, bandwidth: bytes, both per second;
    capability: 90 for sm_90."""

    processors: int
    flops: float
    bandwidth: float
    capability: int = 90


_WIDE = (Tile(32, 128, 256, 4, 3), Tile(64, 128, 256, 8, 3))
_LEAN = (Tile(32, 128, 256, 4, 3), Tile(64, 128, 256, 4, 2))
"""Sums of one kind only leave registers for twice as many outputs in a warp, which read the inputs half as often."""
_FEW = (Tile(8, 128, 256, 4, 4), Tile(16, 128, 256, 4, 4, 240))
_NARROW = Tile(8, 128, 256, 2, 3, programs=3)
"""Of programs of two warps it takes three to keep a processor busy."""
TILES: dict[str, tuple[Tile, ...]] = {
    "arithmetic": (*_FEW, *_LEAN),
    "short groups": (_NARROW, Tile(16, 128, 256, 2, 3, programs=3), *_LEAN),
    "many fields": (Tile(8, 128, 256, 2, 4, programs=3), Tile(16, 128, 256, 2, 3, programs=3), *_LEAN),
    "planes": (_NARROW, Tile(16, 128, 256, 2, 3, programs=3), *_LEAN),
    "sums of groups": (_FEW[0], Tile(16, 128, 256, 4, 4, 232), *_WIDE),
    "sums of short groups": (_NARROW, Tile(16, 64, 256, 2, 4, 255, programs=3), *_WIDE),
    "sums of planes": (Tile(8, 128, 256, 4, 3, 255), Tile(16, 128, 256, 4, 3, 240), *_WIDE),
    "table": (_FEW[0], Tile(16, 128, 256, 4, 4, 255), *_WIDE),
    "float32": (Tile(16, 64, 128, 4, 2), Tile(32, 64, 128, 4, 2)),
    "eight bits": (
        Tile(16, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(64, 128, 128, 4, 3),
        Tile(128, 128, 128, 8, 3),
    ),
    "eight bits and zeros": (Tile(16, 64, 128, 4, 4), Tile(32, 64, 128, 4, 4), Tile(64, 128, 128, 8, 3)),
}
"""By how weights are decoded, then by rows. More than 64 rows of tiles that decode need more registers than there are.
Four stages are kept on their way where there is room: memory takes about a microsecond (benchmarks.static_gates)."""

OLDER_TILES: dict[str, tuple[Tile, ...]] = {
    "arithmetic": (*_FEW, Tile(32, 128, 256, 4, 3), Tile(64, 128, 256, 4, 2, pieces=2)),
    "short groups": (_NARROW, Tile(16, 128, 256, 2, 3, 255), *_LEAN),
    "many fields": (
        Tile(8, 128, 256, 2, 4, programs=3),
        Tile(16, 128, 256, 4, 4, 240),
        Tile(32, 128, 256, 4, 3),
        Tile(64, 128, 256, 4, 2, 255, pieces=2),
    ),
    "planes": (Tile(8, 128, 256, 2, 3), Tile(16, 128, 256, 4, 3, 240), *_WIDE),
    "sums of groups": (Tile(8, 128, 256, 4, 4, 255), _FEW[1], *_WIDE),
    "sums of short groups": (_NARROW, Tile(16, 128, 256, 4, 4, 240), *_WIDE),
    "sums of planes": (
        Tile(8, 128, 256, 4, 3),
        Tile(16, 128, 256, 4, 3, 240),
        Tile(32, 128, 256, 4, 3),
        Tile(64, 128, 128, 8, 3),
    ),
    "table": (*_FEW, *_WIDE),
}
"""Where they differ before sm_90, whose tensor cores multiply 64 rows for fewer registers."""

_PER_PROCESSOR: dict[tuple[int, int], tuple[float, float]] = {
    (8, 0): (2.9e12, 1.62e10), (8, 6): (0.9e12, 0.9e10), (8, 9): (1.25e12, 0.7e10), (9, 0): (6.0e12, 2.5e10),
}  # fmt: skip
"""By compute capability: flops and bandwidth of one processor, as large products and copies reach them."""
_UNKNOWN = (4.0e12, 2.0e10)
_INTERPRETED = Device(8, 2.6e14, 3.0e12)
_FUSED_EFFICIENCY = 0.55
"""Share of a dense product's speed that ours reach when they compute rather than wait for memory."""


def tile_for(rows: int, decoding: str, capability: int) -> Tile:
    """The smallest tile that holds the rows, or the largest."""
    tiles = (OLDER_TILES if capability < 90 else TILES).get(decoding, TILES[decoding])
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


def pieces_of(tile: Tile, layout: WordLayout) -> dict[str, int]:
    """The constants of the product that say how a step takes its inputs."""
    rows = layout.rows_for(tile.inputs)
    pieces = tile.pieces if rows % (tile.pieces * FEWEST_ROWS) == 0 else 1
    return {"ROWS": rows // pieces, "PIECES": pieces}


def split_of(tiles: int, blocks: int, device: Device, programs: int) -> tuple[int, int]:
    """Runs into which the blocks of every tile are split, and blocks of a run: `programs` for every processor.

    >>> split_of(32, 32, Device(132, 0, 0), 2)
    (8, 4)
    """
    wanted = max(1, programs * device.processors // tiles)
    # Runs of one block would move more partial sums than weights.
    chunk = max(-(-blocks // wanted), min(2, blocks))
    return -(-blocks // chunk), chunk


def is_dense_better(rows: int, n: int, k: int, weight_bytes: int, device: Device) -> bool:
    """True if unpacking the weight once and multiplying densely takes less time than the fused kernel."""
    flops = 2 * rows * n * k / device.flops
    fused = max(weight_bytes / device.bandwidth, flops / _FUSED_EFFICIENCY)
    dense = (weight_bytes + 4 * n * k) / device.bandwidth + flops
    return dense < fused


@cache
def device_facts(device: torch.device) -> Device:
    """What is known of a device."""
    if device.type != "cuda":
        return _INTERPRETED
    found = torch.cuda.get_device_properties(device)
    flops, bandwidth = _PER_PROCESSOR.get((found.major, found.minor), _UNKNOWN)
    count = int(found.multi_processor_count)
    return Device(count, flops * count, bandwidth * count, 10 * found.major + found.minor)
