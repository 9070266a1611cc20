"""Where the bits of a block are: the byte order of every GGUF tensor type that stores codes, as rows of a table.

A block holds float16 numbers and fields of small integers: the codes of its weights, and in superblocks the codes of
its scales (then of its minima). A `Plane` puts some bits of a field into a run of bytes:

    byte[chunk * run + r] holds entry[chunk * stack * run + k * run + r] at bit `shift + k * width`, k < stack

so `run=1` lays neighbours side by side in a byte, and `run=16, width=4` puts entry j into the low and entry j + 16 into
the high nibble of byte j. Packing and unpacking read the same rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["LAYOUTS", "RUNS_OF_DIGITS", "Fields", "Layout", "Plane"]

Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]
Name = Literal["codes", "scales"]


@dataclass(frozen=True)
class Fields:
    """The contents of n blocks. codes: [n, weights]. floats: [n, scale and then minimum]. scales: [n, codes of scales,
    then of minima], or [n, 0]."""

    codes: Bytes
    floats: Halves
    scales: Bytes

    @property
    def first_half(self) -> "Fields":
        """The first of two rows of blocks."""
        middle = len(self.codes) // 2
        return Fields(self.codes[:middle], self.floats[:middle], self.scales[:middle])


@dataclass(frozen=True)
class Plane:
    """Bits `start` to `start + width` of entries first..last of a field, from byte `offset` on. flip: bits stored
    inverted (0x80 turns a code with a bias of 128 into a signed byte)."""

    field: Name
    offset: int
    run: int
    width: int
    start: int = 0
    entries: tuple[int, int] | None = None
    shift: int = 0
    flip: int = 0

    def stack(self, count: int) -> int:
        """Entries that share a byte, of `count`."""
        return min((8 - self.shift) // self.width, count // self.run)

    def chosen(self, values: Bytes) -> Bytes:
        """The entries of [n, entries] as [n, chunks, stack, run]; a view."""
        picked = values if self.entries is None else values[:, slice(*self.entries)]
        count = picked.shape[1]
        return picked.reshape(len(values), -1, self.stack(count), self.run)

    def put(self, values: Bytes, block: Bytes) -> None:
        """Or the bits into blocks [n, nbytes]."""
        entries, mask = self.chosen(values), np.uint8((1 << self.width) - 1)
        target = block[:, self.offset : self.offset + entries.shape[1] * self.run]
        target = target.reshape(len(block), -1, self.run)
        for k in range(entries.shape[2]):
            target |= ((entries[:, :, k] >> self.start ^ self.flip) & mask) << (self.shift + k * self.width)
        block[:, self.offset : self.offset + entries.shape[1] * self.run] = target.reshape(len(block), -1)

    def get(self, block: Bytes, values: Bytes) -> None:
        """Or the bits into entries [n, entries]."""
        entries, mask = self.chosen(values), np.uint8((1 << self.width) - 1)
        source = block[:, self.offset : self.offset + entries.shape[1] * self.run].reshape(len(block), -1, self.run)
        for k in range(entries.shape[2]):
            entries[:, :, k] |= ((source >> (self.shift + k * self.width) ^ self.flip) & mask) << self.start


@dataclass(frozen=True)
class Layout:
    """A block of `weights` weights in `nbytes` bytes.

    floats: offsets of the float16 numbers. scales: number of entries of that field. digits: packs and unpacks codes
    where they do not lie in planes.
    """

    weights: int
    nbytes: int
    floats: tuple[int, ...]
    planes: tuple[Plane, ...] = ()
    scales: int = 0
    digits: "Digits | None" = field(default=None)

    def pack(self, fields: Fields) -> Bytes:
        """Blocks [n, nbytes]."""
        block = np.zeros((len(fields.codes), self.nbytes), np.uint8)
        for number, offset in enumerate(self.floats):
            block[:, offset : offset + 2] = np.ascontiguousarray(fields.floats[:, number : number + 1]).view(np.uint8)
        for plane in self.planes:
            plane.put(getattr(fields, plane.field), block)
        if self.digits is not None:
            block[:, : self.digits.nbytes] = self.digits.pack(fields.codes)
        return block

    def unpack(self, block: Bytes) -> Fields:
        """The contents of blocks [n, nbytes]."""
        n = len(block)
        found: Mapping[Name, Bytes] = {
            "codes": np.zeros((n, self.weights), np.uint8),
            "scales": np.zeros((n, self.scales), np.uint8),
        }
        floats = [np.ascontiguousarray(block[:, offset : offset + 2]).view(np.float16) for offset in self.floats]
        for plane in self.planes:
            plane.get(block, found[plane.field])
        codes = found["codes"] if self.digits is None else self.digits.unpack(block[:, : self.digits.nbytes])
        return Fields(codes, np.concatenate(floats, axis=1), found["scales"])


@dataclass(frozen=True)
class Digits:
    """Codes in another number base. nbytes: of the codes of a block."""

    nbytes: int
    pack: Callable[[Bytes], Bytes]
    unpack: Callable[[Bytes], Bytes]


RUNS_OF_DIGITS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))
"""TQ1_0: (first entry, bytes, digits in a byte)."""
_PLACES = np.array([81, 27, 9, 3, 1], np.uint16)


def _pack_base3(codes: Bytes) -> Bytes:
    """Ternary digits as a fraction of 243, scaled to 256 and rounded up: multiplying by 3 shifts a digit out."""
    packed = []
    for first, run, digits in RUNS_OF_DIGITS:
        entries = codes[:, first : first + run * digits].reshape(len(codes), digits, run).astype(np.uint16)
        number = (entries * _PLACES[:digits, None]).sum(axis=1, dtype=np.uint16)
        packed.append(((number * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate(packed, axis=1)


def _unpack_base3(packed: Bytes) -> Bytes:
    found, start = [], 0
    for _, run, digits in RUNS_OF_DIGITS:
        source = packed[:, None, start : start + run]
        shifted = source * np.array([1, 3, 9, 27, 81], np.uint8)[:digits, None]  # modulo 256
        found.append((shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(len(packed), -1))
        start += run
    return np.concatenate(found, axis=1)


_SCALES_AND_MINIMA = (
    Plane("scales", 4, 4, 6, entries=(0, 4)),
    Plane("scales", 4, 4, 2, start=4, entries=(4, 8), shift=6),
    Plane("scales", 8, 4, 6, entries=(8, 12)),
    Plane("scales", 8, 4, 2, start=4, entries=(12, 16), shift=6),
    Plane("scales", 12, 4, 4, entries=(4, 8)),
    Plane("scales", 12, 4, 4, entries=(12, 16), shift=4),
)
"""Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in twelve bytes."""

LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(32, 18, (0,), (Plane("codes", 2, 16, 4),)),
    "Q4_1": Layout(32, 20, (0, 2), (Plane("codes", 4, 16, 4),)),
    "Q5_0": Layout(32, 22, (0,), (Plane("codes", 2, 1, 1, start=4), Plane("codes", 6, 16, 4))),
    "Q5_1": Layout(32, 24, (0, 2), (Plane("codes", 4, 1, 1, start=4), Plane("codes", 8, 16, 4))),
    "Q8_0": Layout(32, 34, (0,), (Plane("codes", 2, 1, 8, flip=0x80),)),
    "Q2_K": Layout(256, 84, (80, 82), (Plane("scales", 0, 16, 4), Plane("codes", 16, 32, 2)), 32),
    "Q3_K": Layout(
        256, 110, (108,),
        (
            Plane("codes", 0, 32, 1, start=2), Plane("codes", 32, 32, 2),
            Plane("scales", 96, 8, 4), Plane("scales", 104, 4, 2, start=4),
        ), 16,
    ),
    "Q4_K": Layout(256, 144, (0, 2), (*_SCALES_AND_MINIMA, Plane("codes", 16, 32, 4)), 16),
    "Q5_K": Layout(
        256, 176, (0, 2), (*_SCALES_AND_MINIMA, Plane("codes", 16, 32, 1, start=4), Plane("codes", 48, 32, 4)), 16
    ),
    "Q6_K": Layout(
        256, 210, (208,),
        (
            Plane("codes", 0, 64, 4), Plane("codes", 128, 32, 2, start=4),
            Plane("scales", 192, 1, 8, flip=0x80),
        ), 16,
    ),
    "IQ4_NL": Layout(32, 18, (0,), (Plane("codes", 2, 16, 4),)),
    "IQ4_XS": Layout(
        256, 136, (0,),
        (Plane("scales", 2, 1, 2, start=4), Plane("scales", 4, 1, 4), Plane("codes", 8, 16, 4)), 8,
    ),
    "TQ1_0": Layout(256, 54, (52,), digits=Digits(52, _pack_base3, _unpack_base3)),
    "TQ2_0": Layout(256, 66, (64,), (Plane("codes", 0, 32, 2),)),
}  # fmt: skip
"""Layouts by the names of the types."""
