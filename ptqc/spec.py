"""WeightSpec: how a weight is stored.

A spec is a value. Its short name parses back: `WeightSpec.parse(str(spec)) == spec`.

    <codes>[g<group> | t | b<rows>x<group>][z | f | m][dq][-<scale type>][-<packing>]

    int4g64     4-bit integers, groups of 64 inputs, symmetric        int4g64z   with an integer zero point
    int4g64f    with a float zero point (HQQ)                         int4g32m   with a float minimum
    int8        one scale per output row                              int8t      one scale for the tensor
    nf4g64      NormalFloat, float32 scales                           nf4g64dq   with doubly quantized scales
    fp8e4m3     per output row                                        fp8e4m3b128x128   blocks
    ternaryg64  levels -1, 0, 1, five weights to a byte               q4_K, mxfp4, ...  rows of KNOWN_SPECS
    e8p         2 bits: points of E8, eight weights to a code         e8p3, e8p4        3 and 4 bits, residual codes
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch

from ptqc.codebooks import CODEBOOKS, Codebook, codebook
from ptqc.errors import SpecError
from ptqc.packing import PACKINGS, Packing

__all__ = ["KNOWN_SPECS", "SCALE_DTYPES", "ScaleSpec", "WeightSpec", "Zero"]

Zero = Literal["none", "int", "float", "min"]

SCALE_DTYPES: dict[str, torch.dtype] = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}
_ZERO_LETTERS: dict[Zero, str] = {"none": "", "int": "z", "float": "f", "min": "m"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSpec:
    """How scales are stored: as floats of `dtype`, or as `bits`-wide codes under one float per `block` of them.

    signed: the codes are centred integers; `dynamic`: they index the 8-bit dynamic map, after
    subtracting the mean of all scales (the double quantization of QLoRA).
    """

    dtype: str = "f16"
    bits: int | None = None
    block: int | None = None
    signed: bool = False
    dynamic: bool = False

    @property
    def is_nested(self) -> bool:
        """Whether scales are codes under scales of their own."""
        return self.bits is not None and self.block is not None

    @property
    def bits_per_scale(self) -> float:
        """Bits of one scale, its share of the outer scale included."""
        width = SCALE_DTYPES[self.dtype].itemsize * 8
        return width if self.bits is None or self.block is None else self.bits + width / self.block


DOUBLE_QUANT = ScaleSpec(dtype="f32", bits=8, block=256, dynamic=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """How a weight is stored: w[o, i] ~= scale[o // rows, i // group] * (level(code[o, i]) - zero[same]).

    With zero="min" the stored minimum is subtracted after scaling instead: scale * level - minimum.
    Integer codes without a zero are centred: level = code - 2**(bits - 1).
    """

    bits: int
    group: int | None = None
    """Inputs that share a scale; None: the whole row."""
    rows: int | None = 1
    """Outputs that share a scale; None: all of them."""
    zero: Zero = "none"
    codebook: str | None = None
    vector: int = 1
    """Weights per code: 8 for codebooks that are lattices, else 1."""
    scale: ScaleSpec = field(default_factory=ScaleSpec)
    packing: str = "linear"

    def __post_init__(self) -> None:
        widest = 32 if self.codebook else 8
        if not 1 <= self.bits <= widest:
            raise SpecError(f"codes are 1 to {widest} bits wide, not {self.bits}")
        for name, value in (("group", self.group), ("rows", self.rows)):
            if value is not None and value < 1:
                raise SpecError(f"{name} must be positive or None, not {value}")
        if self.codebook is not None and codebook(self.codebook).bits != self.bits:
            raise SpecError(f"codebook {self.codebook!r} has {codebook(self.codebook).bits}-bit codes, not {self.bits}")
        self._check_vector()
        if self.packing not in PACKINGS:
            raise SpecError(f"no packing is called {self.packing!r}; known: {', '.join(PACKINGS)}")
        if self.scale.dtype not in SCALE_DTYPES:
            raise SpecError(f"no scale type is called {self.scale.dtype!r}; known: {', '.join(SCALE_DTYPES)}")

    def _check_vector(self) -> None:
        vector = 1 if self.codebook is None else codebook(self.codebook).vector
        if self.vector != vector:
            raise SpecError(f"codes of {self.codebook or 'integers'} stand for {vector} weights, not {self.vector}")
        if vector == 1:
            return
        if self.zero != "none":
            raise SpecError(f"codebook {self.codebook!r} is symmetric: its points have no zero")
        if self.group is not None and self.group % vector:
            raise SpecError(f"codes of {self.codebook} stand for {vector} weights: group {self.group} cuts them")

    # ---------------------------------------------------------------- values

    @property
    def book(self) -> Codebook | None:
        """The codebook, or None for integers."""
        return None if self.codebook is None else codebook(self.codebook)

    @property
    def packer(self) -> Packing:
        """The pair of functions that packs and unpacks the codes."""
        return PACKINGS[self.packing]

    @property
    def is_symmetric(self) -> bool:
        """True if nothing is subtracted from the level."""
        return self.zero == "none"

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight, scales and zeros included, in a large weight.

        A scale that is shared by a whole row or tensor counts as nothing here; `nbytes` counts everything.
        """
        code_bits = self.packer.bits_per_code(self.bits) / self.vector
        if self.group is None or self.rows is None:
            return code_bits
        per_group = self.scale.bits_per_scale
        if self.zero == "int":
            per_group += self.bits
        elif self.zero != "none":
            per_group += self.scale.bits_per_scale
        return code_bits + per_group / (self.group * self.rows)

    def groups(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the scale matrix for a weight of `shape` [..., out, in].

        Raises: SpecError if a group does not divide the weight, with the groups that would.
        """
        out_features, in_features = shape[-2:]
        group, rows = self.group or in_features, self.rows or out_features
        if min(shape) == 0:
            raise SpecError(f"a weight of shape {tuple(shape)} holds nothing to quantize")
        if in_features % self.vector:
            raise SpecError(
                f"codes of {self.codebook} stand for {self.vector} weights, which do not divide in_features "
                f"{in_features}; leave this weight in floating point, or use integers such as int4 or int2z"
            )
        if self.is_block:
            return -(-out_features // rows), -(-in_features // group)
        if in_features % group:
            raise SpecError(
                f"group {group} does not divide in_features {in_features}; use {_advise(in_features, group)}"
            )
        return -(-out_features // rows), in_features // group

    @property
    def is_block(self) -> bool:
        """True for two-dimensional blocks (their last row and column of blocks may be partial)."""
        return self.group is not None and self.rows is not None and self.rows > 1

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of all parts of a weight of `shape` [..., out, in], row padding included."""
        out_features, in_features = shape[-2:]
        scale_rows, scale_columns = self.groups(shape)
        stack = math.prod(shape[:-2])
        total = stack * out_features * self.packer.row_bytes(self.bits, in_features // self.vector)
        scales = stack * scale_rows * scale_columns
        total += self._scale_bytes(scales, stack * scale_rows, scale_columns)
        if self.zero == "int":
            total += stack * scale_rows * PACKINGS["linear"].row_bytes(self.bits, scale_columns)
        elif self.zero != "none":
            total += self._scale_bytes(scales, stack * scale_rows, scale_columns)
        return total

    def _scale_bytes(self, scales: int, rows: int, columns: int) -> int:
        width = SCALE_DTYPES[self.scale.dtype].itemsize
        if self.scale.bits is None or self.scale.block is None:
            return scales * width
        codes = rows * PACKINGS["linear"].row_bytes(self.scale.bits, columns)
        return codes + -(-scales // self.scale.block) * width + (4 if self.scale.dynamic else 0)

    # ---------------------------------------------------------------- fitting

    def fit(self, shape: Sequence[int]) -> "WeightSpec":
        """The nearest spec that divides a weight of `shape` [..., out, in]: itself wherever it can.

        Rules: 1. a group no smaller than the row becomes the whole row; 2. otherwise the largest divisor of
        in_features between a quarter of the group (at least 8) and the group; 3. otherwise the whole row.
        Superblocks (quantized scales) have one group only and stay as they are.
        """
        in_features = shape[-1]
        if self.group is None or self.is_block or (self.scale.bits is not None and not self.scale.dynamic):
            return self
        if in_features % self.group == 0 and self.group < in_features:
            return self
        if self.group >= in_features:
            return replace(self, group=None)
        smallest = max(8, self.group // 4)
        fitting = [g for g in range(self.group, smallest - 1, -1) if in_features % g == 0 and g % self.vector == 0]
        return replace(self, group=fitting[0] if fitting else None)

    def with_scale_dtype(self, dtype: str) -> "WeightSpec":
        """The same spec with scales of another float type."""
        return replace(self, scale=replace(self.scale, dtype=dtype))

    # ---------------------------------------------------------------- names

    def __str__(self) -> str:
        known = _NAME_OF_KNOWN.get(self)
        return known if known is not None else self._spelled()

    def _spelled(self) -> str:
        name = self.codebook or f"int{self.bits}"
        if self.is_block:
            name += f"b{self.rows}x{self.group}"
        elif self.group is not None:
            name += f"g{self.group}"
        elif self.rows is None:
            name += "t"
        name += _ZERO_LETTERS[self.zero]
        if self.scale.dynamic:
            name += "dq"
        elif self.scale.dtype != _default_scale_dtype(self.codebook):
            name += f"-{self.scale.dtype}"
        if self.packing != _default_packing(self.codebook):
            name += f"-{self.packing}"
        return name

    @staticmethod
    def parse(name: str) -> "WeightSpec":
        """The spec that a short name stands for.

        >>> WeightSpec.parse("int4g64z").bits_per_weight
        4.3125

        Raises: SpecError with the grammar if the name does not parse.
        """
        return _parse(name)

    @staticmethod
    def integer(bits: float, group: int | None, zero: Zero = "none") -> "WeightSpec":
        """Integers of `bits` bits; 1.58 bits mean the ternary codebook.

        Raises: SpecError for a width that has no integer spec.
        """
        if bits in (1.5, 1.58, 1.6):
            if zero != "none":
                raise SpecError("ternary weights are symmetric: levels -1, 0 and 1")
            return WeightSpec(bits=2, codebook="ternary", group=group, packing="base3")
        if not 1 <= bits <= 8 or bits != int(bits):
            raise SpecError(f"no integer spec has {bits} bits; use 1.58 (ternary), 1, 2, 3, 4, 5, 6, 7 or 8")
        return WeightSpec(bits=int(bits), group=group, zero=zero)


def _advise(in_features: int, group: int) -> str:
    divisors = [d for d in range(8, min(in_features, 1024) + 1, 8) if in_features % d == 0]
    near = sorted(sorted(divisors, key=lambda d: abs(math.log(d / group)))[:3])
    choices = [str(d) for d in near if d != in_features] + [f"the whole row (group None, {in_features})"]
    return " or ".join(choices)


def _default_scale_dtype(book: str | None) -> str:
    return "f16" if book is None else CODEBOOKS[book].scale_dtype


def _default_packing(book: str | None) -> str:
    if book is None:
        return "linear"
    if CODEBOOKS[book].float_dtype is not None:
        return "float"
    return "base3" if book == "ternary" else "linear"


def _superblock(bits: int, group: int, scale_bits: int, zero: Zero = "none", signed: bool = False) -> WeightSpec:
    scale = ScaleSpec(bits=scale_bits, block=256 // group, signed=signed)
    return WeightSpec(bits=bits, group=group, zero=zero, scale=scale)


KNOWN_SPECS: dict[str, WeightSpec] = {
    "q8_0": WeightSpec(bits=8, group=32),
    "q4_0": WeightSpec(bits=4, group=32),
    "q4_1": WeightSpec(bits=4, group=32, zero="min"),
    "q5_0": WeightSpec(bits=5, group=32),
    "q5_1": WeightSpec(bits=5, group=32, zero="min"),
    "q2_K": _superblock(2, 16, 4, "min"),
    "q3_K": _superblock(3, 16, 6, signed=True),
    "q4_K": _superblock(4, 32, 6, "min"),
    "q5_K": _superblock(5, 32, 6, "min"),
    "q6_K": _superblock(6, 16, 8, signed=True),
    "iq4_nl": WeightSpec(bits=4, group=32, codebook="iq4nl"),
    "iq4_xs": WeightSpec(bits=4, group=32, codebook="iq4nl", scale=ScaleSpec(bits=6, block=8, signed=True)),
    "tq2_0": WeightSpec(bits=2, group=256, codebook="ternary"),
    "mxfp4": WeightSpec(bits=4, group=32, codebook="e2m1", scale=ScaleSpec(dtype="e8m0")),
    "nvfp4": WeightSpec(bits=4, group=16, codebook="e2m1", scale=ScaleSpec(dtype="e4m3")),
}
"""Formats with a name of their own. Only values are described: the bit order in a file is its exporter's business."""

_ALIASES = frozenset(
    {"q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "tq2_0", "mxfp4", "nvfp4"}
)  # parse, but print spelled out
_NAME_OF_KNOWN = {spec: name for name, spec in KNOWN_SPECS.items() if name not in _ALIASES}

_GRAMMAR = re.compile(
    rf"(?P<codes>int(?P<bits>\d+)|{'|'.join(sorted(CODEBOOKS, key=len, reverse=True))})"
    r"(?:g(?P<group>\d+)|(?P<tensor>t)|b(?P<rows>\d+)x(?P<columns>\d+))?"
    rf"(?P<zero>[zfm])?(?P<double>dq)?(?:-(?P<dtype>{'|'.join(SCALE_DTYPES)}))?(?:-(?P<packing>{'|'.join(PACKINGS)}))?"
)


@lru_cache(maxsize=4096)
def _parse(name: str) -> WeightSpec:
    if name in KNOWN_SPECS:
        return KNOWN_SPECS[name]
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise SpecError(
            f"{name!r} is no weight spec; use <codes>[g<group>|t|b<rows>x<columns>][z|f|m][dq], codes being int1..int8 "
            f"or "
            f"{', '.join(CODEBOOKS)}, for example int4g64 or nf4g64dq; or one of {', '.join(KNOWN_SPECS)}"
        )
    part = match.groupdict()
    book = None if part["bits"] else part["codes"]
    group = part["group"] or part["columns"]
    return WeightSpec(
        bits=int(part["bits"]) if book is None else codebook(book).bits,
        vector=1 if book is None else codebook(book).vector,
        group=int(group) if group else None,
        rows=None if part["tensor"] else int(part["rows"] or 1),
        zero=next(zero for zero, letter in _ZERO_LETTERS.items() if letter == (part["zero"] or "")),
        codebook=book,
        scale=DOUBLE_QUANT if part["double"] else ScaleSpec(dtype=part["dtype"] or _default_scale_dtype(book)),
        packing=part["packing"] or _default_packing(book),
    )
