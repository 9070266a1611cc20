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
from ptqc.codegen.gpu.levels import NOUGHT, byte_look_ups, packed_bytes, plain_byte, planes_before, whole_levels
from ptqc.codegen.gpu.ptx import HALVES, Program
from ptqc.codegen.gpu.words import Piece, WordLayout
from ptqc.spec import WeightSpec

__all__ = ["BYTE_CENTRE", "SMALLEST", "centred_bytes", "decode_scaled", "decode_scaled_table", "is_scaled",
           "scale_steps"]  # fmt: skip

SMALLEST = 2.0**-24
"""The smallest float16: what a mantissa's last bit is worth where the exponent is zero."""

_HIGHEST_OFFSET = 4
"""Fields lie at most this high in a mantissa: each offset asks for a scale of its own, shifts are shared by fields."""

_WIDEST_ZERO = 4
"""Bits of codes whose integer zeros may be rounded with the scale: c has 11 bits."""

BYTE_CENTRE = 128
"""The byte of level 0: a power of two, whose product with a scale is exact."""

_SCALED_LEVEL = f"""@triton.jit
def scaled_level(code, s, planes_ptr):
    byte = {plain_byte("planes_ptr")}
    return (byte.to(tl.float32) * (s * {SMALLEST}) - s * {BYTE_CENTRE * SMALLEST}).to(tl.float16)"""


def is_scaled(spec: WeightSpec, dtype: torch.dtype, group: int | None) -> bool:
    """True if weights of this spec come scaled out of the decoder: integers, or tables of them, in groups, in float16.

    Integer zeros of wide codes are subtracted before scaling, which is exact.
    """
    is_exact = spec.zero != "int" or spec.bits <= _WIDEST_ZERO
    is_integer = spec.book is None or spec.codebook == "ternary" or whole_levels(spec.book.levels) is not None
    return dtype == torch.float16 and group is not None and is_integer and is_exact


def scale_steps(layout: WordLayout, fields_per_scale: int) -> tuple[float, ...]:
    """What the scales of a block are stored multiplied by: the smallest step of the fields that share each.

    A scale of one field, or the constant zero of several, then needs no product of its own.
    """
    steps = [min(piece.step for piece in plan) for plan in _plans(layout)]
    return tuple(min(steps[at : at + fields_per_scale]) for at in range(0, layout.fields, fields_per_scale))


def _plans(layout: WordLayout) -> list[list[Placed]]:
    return place_fields(layout, HALVES[torch.float16], _HIGHEST_OFFSET)


def decode_scaled(layout: WordLayout, subtracted: Subtracted, fields_per_scale: int) -> tuple[str, list[str]]:
    """Text of the functions, and the lines that call them: f0, f1, .. from words w0, .. and scale words v0, .."""
    steps = scale_steps(layout, fields_per_scale)
    functions, calls = [], []
    for j, (pieces, plan) in enumerate(zip(layout.pieces, _plans(layout), strict=True)):
        places = [j // fields_per_scale]
        step = steps[places[0]]
        if subtracted.is_tile:
            places.append(layout.fields // fields_per_scale + places[0])
        words = dict.fromkeys([*(f"w{piece.word}" for piece in pieces), *(f"v{at // 2}" for at in places)])
        arguments = ", ".join([*words, "PTX"])
        functions.append(
            "\n".join([
                "@triton.jit",
                f"def decode_{j}({arguments}: tl.constexpr):",
                "    if PTX:",
                f"        return {_program(plan, subtracted, places, step)}",
                *_plain_lines(pieces, subtracted, places, step),
            ])
        )  # fmt: skip
        calls.append(f"f{j} = decode_{j}({arguments})")
    return "\n\n\n".join(functions), calls


def _plain_lines(pieces: Sequence[Piece], subtracted: Subtracted, places: Sequence[int], step: float) -> list[str]:
    scale, *rest = map(_plain_scale, places)
    minus = rest[0] if rest else f"s * {-subtracted.constant * SMALLEST}"
    return [
        f"    s = {scale} * {1 / step}",
        f"    c = {minus}",
        f"    return (({code_expression(pieces)}).to(tl.float32) * (s * {SMALLEST}) + c).to(tl.float16)",
    ]


def _program(plan: Sequence[Placed], subtracted: Subtracted, places: Sequence[int], step: float) -> str:
    """Equal instructions of several functions and rows, on scales above all, are found by the assembler.

    step: what the scale is stored multiplied by.
    """
    program = Program(HALVES[torch.float16], 1)
    scale, *rest = (_spread(program, at) for at in places)
    total = rest[0] if rest else _times(program, scale, -subtracted.constant * SMALLEST / step)
    # High bits first: what the zero leaves of them needs no rounding.
    for pieces in reversed(joined(plan)):
        bits = ""
        for piece in pieces:
            word, mask = program.shifted(piece.word, piece.shift), f"0x{piece.mask * 0x10001:08x}"
            bits = program.fresh(
                f"lop3.b32 @, {word}, {mask}, {bits}, 0xea;" if bits else f"and.b32 @, {word}, {mask};"
            )
        total = program.fma(bits, _times(program, scale, pieces[0].step / step), total)
    return program.call([total], tile_registers=2)


def decode_scaled_table(layout: WordLayout, fields_per_scale: int) -> tuple[str, list[str], list[str]]:
    """The same for codes of 4 bits that index 16 bytes, `centred_bytes`; and the lines before the loop.

    A byte is a subnormal number as it is, so one table of bytes is looked up, not two.
    """
    planes = ", ".join(f"plane{i}" for i in range(4))
    functions, calls = [], []
    for word in range(layout.words):
        fields = range(4 * word, 4 * word + 4)
        places = [j // fields_per_scale for j in fields]
        scales = ", ".join(dict.fromkeys(f"v{at // 2}" for at in places))
        functions.append(
            "\n".join([
                "@triton.jit",
                f"def decode_{word}(w0, {scales}, planes_ptr, {planes}, PTX: tl.constexpr):",
                "    if PTX:",
                f"        return {_table_program(places)}",
                f"    return {', '.join(_plain_table(j, at) for j, at in enumerate(places))}",
            ])
        )  # fmt: skip
        names = ", ".join(f"f{j}" for j in fields)
        calls.append(f"{names} = decode_{word}(w{word}, {scales}, planes_ptr, {planes}, PTX)")
    return "\n\n\n".join([NOUGHT, _SCALED_LEVEL, *functions]), calls, planes_before(4)


def centred_bytes(levels: Sequence[int]) -> list[int]:
    """Levels as bytes above `BYTE_CENTRE`, packed: a table for `decode_scaled_table`."""
    return packed_bytes([level + BYTE_CENTRE for level in levels])


def _plain_table(field: int, place: int) -> str:
    return f"scaled_level(((w0 >> {4 * field}) & 15).to(tl.int32), {_plain_scale(place)}, planes_ptr)"


def _plain_scale(place: int) -> str:
    return f"{('low', 'high')[place % 2]}(v{place // 2})"


def _table_program(places: Sequence[int]) -> str:
    program = Program(HALVES[torch.float16], 4)
    planes = [program.tile(f"plane{i}") for i in range(4)]
    results = []
    for first, (found,) in zip((0, 2), byte_look_ups(program, [planes]), strict=True):
        for at, select in enumerate(("0x4240", "0x4341")):
            scale = _spread(program, places[first + at])
            byte = program.fresh(f"prmt.b32 @, {found}, 0, {select};")
            results.append(program.fma(byte, scale, _times(program, scale, -BYTE_CENTRE * SMALLEST)))
    return program.call(results, tile_registers=2)


def _spread(program: Program, place: int) -> str:
    """The low or the high half of a word in both halves: assemblers make it part of the instruction that reads it."""
    tile, half = program.tile(f"v{place // 2}[:, None]"), ("low", "high")[place % 2]
    halves = f".reg .b16 low, high; mov.b32 {{low, high}}, {tile};"
    return program.once(f"half {place}", f"{{ {halves} mov.b32 @, {{{half}, {half}}}; }}")


def _times(program: Program, scale: str, factor: float) -> str:
    if factor == 1.0:
        return scale
    return program.once(f"{scale} times {factor}", f"mul.rn.f16x2 @, {scale}, {program.number(factor)};")
