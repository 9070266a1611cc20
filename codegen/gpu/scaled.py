"""From words to weights, scales and zeros included, in as few instructions as to levels: codes as subnormal numbers.

Bits of a float16 below its smallest normal number are a multiple of 2^-24, and are multiplied at full speed. So a
masked field is a number as it is, and one `fma` scales it and takes the zero away, with one rounding:

    scale * (code - zero) = (code * 2^(o - 24)) * (scale * 2^(24 - o)) + (-zero * scale)         and, fma.f16x2

The magic of `ptqc.codegen.gpu.decode` cannot do that: 1024 * scale has no room in 11 bits. Sums then need no scaling,
which costs rows / group instructions per weight, and registers for the sum of a group.

Scales are float16, two to a word of 32 bits: s = 2^24 scale / norm, below 2^15, so weights are below 2^-6 and rounded
to 2^-18 of the largest of their output. Zeros lie behind them as c = -zero * s * 2^-24.
"""

from collections.abc import Sequence

import torch

from ptqc.codegen.gpu.decode import Placed, Subtracted, code_expression, joined, place_fields
from ptqc.codegen.gpu.ptx import HALVES, Program
from ptqc.codegen.gpu.words import Piece, WordLayout
from ptqc.spec import WeightSpec

__all__ = ["SMALLEST", "decode_scaled", "is_scaled"]

SMALLEST = 2.0**-24
"""The smallest float16: what a mantissa's last bit is worth where the exponent is zero."""

_HIGHEST_OFFSET = 4
"""Fields lie at most this high in a mantissa: each offset asks for a scale of its own, shifts are shared by fields."""

_WIDEST_ZERO = 4
"""Bits of codes whose integer zeros may be rounded with the scale: c has 11 bits."""

_SELECT = ("0x1010", "0x3232")
"""Byte permutations that put the low, the high half of a word in both halves."""


def is_scaled(spec: WeightSpec, dtype: torch.dtype, group: int | None) -> bool:
    """True if weights of this spec come scaled out of the decoder: integers in groups, in float16.

    Integer zeros of wide codes are subtracted before scaling, which is exact.
    """
    is_exact = spec.zero != "int" or spec.bits <= _WIDEST_ZERO
    is_integer = spec.book is None or spec.codebook == "ternary"
    return dtype == torch.float16 and group is not None and is_integer and is_exact


def decode_scaled(layout: WordLayout, subtracted: Subtracted, fields_per_scale: int) -> tuple[str, list[str]]:
    """Text of the functions, and the lines that call them: f0, f1, .. from words w0, .. and scale words v0, .."""
    plans = place_fields(layout, HALVES[torch.float16], _HIGHEST_OFFSET)
    least = min(piece.step for plan in plans for piece in plan)
    functions, calls = [], []
    for j, (pieces, plan) in enumerate(zip(layout.pieces, plans, strict=True)):
        places = [j // fields_per_scale]
        if subtracted.is_tile:
            places.append(layout.fields // fields_per_scale + places[0])
        words = dict.fromkeys([*(f"w{piece.word}" for piece in pieces), *(f"v{at // 2}" for at in places)])
        arguments = ", ".join([*words, "PTX"])
        functions.append(
            "\n".join([
                "@triton.jit",
                f"def decode_{j}({arguments}: tl.constexpr):",
                "    if PTX:",
                f"        return {_program(plan, subtracted, places, least)}",
                *_plain_lines(pieces, subtracted, places),
            ])
        )  # fmt: skip
        calls.append(f"f{j} = decode_{j}({arguments})")
    return "\n\n\n".join(functions), calls


def _plain_lines(pieces: Sequence[Piece], subtracted: Subtracted, places: Sequence[int]) -> list[str]:
    scale, *rest = (f"{('low', 'high')[at % 2]}(v{at // 2})" for at in places)
    minus = rest[0] if rest else f"s * {-subtracted.constant * SMALLEST}"
    return [
        f"    s = {scale}",
        f"    c = {minus}",
        f"    return (({code_expression(pieces)}).to(tl.float32) * (s * {SMALLEST}) + c).to(tl.float16)",
    ]


def _program(plan: Sequence[Placed], subtracted: Subtracted, places: Sequence[int], least: float) -> str:
    """Equal instructions of several functions and rows, on scales above all, are found by the assembler.

    least: the smallest step of all fields. A constant zero is made from the scale for it, which spares registers.
    """
    program = Program(HALVES[torch.float16], 1)
    scale, *rest = (_spread(program, at) for at in places)
    constant = -subtracted.constant * SMALLEST / least
    total = rest[0] if rest else _times(program, _times(program, scale, least), constant)
    # High bits first: what the zero leaves of them needs no rounding.
    for pieces in reversed(joined(plan)):
        bits = ""
        for piece in pieces:
            word, mask = program.shifted(piece.word, piece.shift), f"0x{piece.mask * 0x10001:08x}"
            bits = program.fresh(
                f"lop3.b32 @, {word}, {mask}, {bits}, 0xea;" if bits else f"and.b32 @, {word}, {mask};"
            )
        total = program.fma(bits, _times(program, scale, pieces[0].step), total)
    return program.call([total], tile_registers=2)


def _spread(program: Program, place: int) -> str:
    tile = program.tile(f"v{place // 2}[:, None]")
    return program.once(f"half {place}", f"prmt.b32 @, {tile}, {tile}, {_SELECT[place % 2]};")


def _times(program: Program, scale: str, factor: float) -> str:
    if factor == 1.0:
        return scale
    return program.once(f"{scale} times {factor}", f"mul.rn.f16x2 @, {scale}, {program.number(factor)};")
