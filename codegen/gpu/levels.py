"""From words to levels that are no integers: tables of 16 levels, and 8-bit floats. See `ptqc.codegen.gpu.decode`.

A table is looked up with byte permutations, one for the low and one for the high bytes of the levels: three bits of a
code choose among eight bytes, twice, and the fourth between the two that were found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ptqc.codegen.gpu.ptx import Half, Program
from ptqc.codegen.gpu.words import WordLayout

__all__ = [
    "NOUGHT",
    "WholeLevels",
    "byte_look_ups",
    "byte_planes",
    "decode_floats",
    "decode_table",
    "packed_bytes",
    "plain_byte",
    "planes_before",
    "whole_levels",
]

_UNITS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class WholeLevels:
    """Levels of a table that are integers of 8 bits once they are multiplied by `unit`, a power of two."""

    unit: int
    levels: tuple[int, ...]


@cache
def whole_levels(levels: tuple[float, ...]) -> WholeLevels | None:
    """The levels as integers with the smallest unit, or None if there is none."""
    for unit in _UNITS:
        scaled = [level * unit for level in levels]
        if levels and all(level == int(level) and abs(level) <= 127 for level in scaled):
            return WholeLevels(unit, tuple(map(int, scaled)))
    return None


def byte_planes(levels: Sequence[float], half: Half) -> list[int]:
    """The bytes of up to 16 levels, four to an int32: four words of low bytes, four of high bytes."""
    dtype = torch.float16 if half.suffix == "f16x2" else torch.bfloat16
    bits = [int(value) & 0xFFFF for value in torch.tensor(list(levels)).to(dtype).view(torch.int16).tolist()]
    return packed_bytes([value & 255 for value in bits]) + packed_bytes([value >> 8 for value in bits])


def packed_bytes(values: Sequence[int]) -> list[int]:
    """Up to 16 bytes, four to an int32, the first lowest."""
    filled = [*values, *[0] * (16 - len(values))]
    return [int.from_bytes(bytes(filled[4 * i : 4 * i + 4]), "little", signed=True) for i in range(4)]


def decode_table(layout: WordLayout, half: Half | None) -> tuple[str, list[str], list[str]]:
    """Text of the function for codes of 4 bits that index 16 levels, the lines that call it, and those before the loop.

    The planes of `byte_planes` come from memory: as constants they would be put into registers again for every use.
    float32 levels are read from memory one by one.
    """
    codes = [f"((w0 >> {4 * j}) & 15).to(tl.int32)" for j in range(4)]
    if half is None:
        plain = ", ".join(f"tl.load(levels_ptr + {code})" for code in codes)
        text = f"@triton.jit\ndef decode_0(w0, levels_ptr, PTX: tl.constexpr):\n    return {plain}"
        return text, _calls(layout, "levels_ptr"), []
    names = ", ".join(f"plane{i}" for i in range(8))
    lines = [
        NOUGHT,
        "",
        "",
        "@triton.jit",
        "def level_of(code, planes_ptr):",
        f"    low, high = {plain_byte('planes_ptr')}, {plain_byte('planes_ptr + 4')}",
        f"    return (low | (high << 8)).to(tl.int16).to({half.triton}, bitcast=True)",
        "",
        "",
        "@triton.jit",
        f"def decode_0(w0, planes_ptr, {names}, PTX: tl.constexpr):",
        "    if PTX:",
        f"        return {_table_program(half)}",
        f"    return {', '.join(f'level_of({code}, planes_ptr)' for code in codes)}",
    ]
    return "\n".join(lines), _calls(layout, "planes_ptr", names), planes_before(8)


def _calls(layout: WordLayout, *tables: str) -> list[str]:
    per_word = layout.fields // layout.words
    fields = [", ".join(f"f{per_word * word + j}" for j in range(per_word)) for word in range(layout.words)]
    return [f"{names} = decode_0({', '.join([f'w{word}', *tables, 'PTX'])})" for word, names in enumerate(fields)]


NOUGHT = """@triton.jit
def nought(PTX: tl.constexpr):
    zero = tl.zeros((1, 1), tl.int32)
    if PTX:
        return tl.inline_asm_elementwise("mov.u32 $0, %lanemask_lt; shr.u32 $0, $0, 31;", "=r,r", [zero],
                                         dtype=tl.int32, is_pure=True, pack=1)
    return zero"""
"""Text of a function that gives 0, which assemblers cannot tell: what they know to be equal in all threads goes to
registers that byte permutations do not read, and is moved for every use (0.9 instructions per weight, sm_80)."""


def planes_before(count: int) -> list[str]:
    """Lines before the loop that bring planes into registers."""
    # Tiles of one number: behind a splat, words would not be decoded in the registers where the product wants them.
    return ["zero = nought(PTX)", *(f"plane{i} = tl.load(planes_ptr + {i} + zero)" for i in range(count))]


def plain_byte(plane: str) -> str:
    """Byte `code` of four words, in plain Triton."""
    return f"(tl.load({plane} + (code >> 2)) >> ((code & 3) * 8)) & 255"


def byte_look_ups(program: Program, tables: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """For each two fields of a word, low ones first: for each table of four registers, the bytes that their codes find.

    Bytes of one register: field 0 and 1 of the first row, field 0 and 1 of the second (fields 2 and 3 likewise). What
    is done with the first comes before the second is looked up: assemblers otherwise move a quarter of the registers.
    """
    word = program.word(0)
    # Bytes of the two rows side by side: fields 0 and 1 of both in the low half, 2 and 3 in the high half.
    codes = program.fresh(f"prmt.b32 @, {word}, {word}, 0x3120;")
    select = program.fresh(f"and.b32 @, {codes}, 0x77777777;")
    upper = program.fresh(f"shr.u32 @, {codes}, 1;")
    merge = program.fresh(f"lop3.b32 @, {upper}, 0x44444444, 0x32103210, 0xea;")
    yield [_look_up(program, table, select, merge) for table in tables]
    select, merge = (program.fresh(f"shr.u32 @, {register}, 16;") for register in (select, merge))
    yield [_look_up(program, table, select, merge) for table in tables]


def _look_up(program: Program, table: Sequence[str], select: str, merge: str) -> str:
    first = program.fresh(f"prmt.b32 @, {table[0]}, {table[1]}, {select};")
    second = program.fresh(f"prmt.b32 @, {table[2]}, {table[3]}, {select};")
    return program.fresh(f"prmt.b32 @, {first}, {second}, {merge};")


def _table_program(half: Half) -> str:
    program = Program(half, 4)
    planes = [program.tile(f"plane{i}") for i in range(8)]
    results = [
        program.fresh(f"prmt.b32 @, {low}, {high}, {order};")
        for low, high in byte_look_ups(program, (planes[:4], planes[4:]))
        for order in ("0x6240", "0x7351")
    ]
    return program.call(results, tile_registers=2)


def decode_floats(layout: WordLayout, dtype: torch.dtype, half: Half | None) -> tuple[str, list[str]]:
    """Text of the function for codes that are 8-bit floats, two to a word, and the lines that call it.

    Sign, exponent and mantissa are moved to where the wider type has them; what its larger bias makes of that is
    undone by a power of two.
    """
    mantissa, bias = (3, 7) if dtype == torch.float8_e4m3fn else (2, 15)
    plain = ", ".join(_plain_float(8 * j, mantissa, bias, half) for j in range(2))
    lines = ["@triton.jit", "def decode_0(w0, PTX: tl.constexpr):"]
    if half is not None:
        lines += ["    if PTX:", f"        return {_float_program(half, mantissa, bias)}"]
    return "\n".join([*lines, f"    return {plain}"]), _calls(layout)


def _plain_float(bit: int, mantissa: int, bias: int, half: Half | None) -> str:
    byte = f"(w0 >> {bit})"
    moved = f"((({byte} & 128) << 8) | (({byte} & 127) << {10 - mantissa}))"
    number = f"{moved}.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * {2.0 ** (15 - bias)}"
    return f"({number}).to({half.triton if half else 'tl.float32'})"


def _float_program(half: Half, mantissa: int, bias: int) -> str:
    program = Program(half, 2)
    down = 8 - (half.mantissa - mantissa)  # from the high byte of a half to the place of the wider mantissa
    own_bias = 15 if half.suffix == "f16x2" else 127
    results = []
    for bit in (0, 8):
        word = program.shifted(0, bit - 8)
        sign = program.fresh(f"and.b32 @, {word}, 0x80008000;")
        moved = word if down == 0 else program.fresh(f"shr.u32 @, {word}, {down};")
        mask = (0x7F00 >> down) * 0x10001
        number = program.fresh(f"lop3.b32 @, {moved}, 0x{mask:08x}, {sign}, 0xea;")
        if own_bias != bias:
            number = program.fma(number, program.number(2.0 ** (own_bias - bias)), program.number(-0.0))
        results.append(number)
    return program.call(results)
