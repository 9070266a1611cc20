"""From words to levels that are no integers: tables of 16 levels, and 8-bit floats. See `ptqc.codegen.gpu.decode`.

A table is looked up with byte permutations, one for the low and one for the high bytes of the levels: three bits of a
code choose among eight bytes, twice, and the fourth between the two that were found.
"""

from collections.abc import Sequence

import torch

from ptqc.codegen.gpu.ptx import Half, Program
from ptqc.codegen.gpu.words import WordLayout

__all__ = ["byte_planes", "decode_floats", "decode_table"]


def byte_planes(levels: Sequence[float], half: Half) -> list[int]:
    """The bytes of up to 16 levels, four to an int32: four words of low bytes, four of high bytes."""
    dtype = torch.float16 if half.suffix == "f16x2" else torch.bfloat16
    bits = [int(value) & 0xFFFF for value in torch.tensor(list(levels)).to(dtype).view(torch.int16).tolist()]
    bits += [0] * (16 - len(bits))
    words = [sum((bits[4 * i + k] >> shift & 255) << 8 * k for k in range(4)) for shift in (0, 8) for i in range(4)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def decode_table(layout: WordLayout, half: Half | None) -> tuple[str, list[str], list[str]]:
    """Text of the function for codes of 4 bits that index 16 levels, the lines that call it, and those before the loop.

    The planes of `byte_planes` come from memory: as constants they would be put into registers again for every use.
    float32 levels are read from memory one by one.
    """
    assert layout.fields == 4 and layout.words == 1
    codes = [f"((w0 >> {4 * j}) & 15).to(tl.int32)" for j in range(4)]
    if half is None:
        plain = ", ".join(f"tl.load(levels_ptr + {code})" for code in codes)
        text = f"@triton.jit\ndef decode_0(w0, levels_ptr, PTX: tl.constexpr):\n    return {plain}"
        return text, ["f0, f1, f2, f3 = decode_0(w0, levels_ptr, PTX)"], []
    planes = ", ".join(f"plane{i}" for i in range(8))
    lines = [
        "@triton.jit",
        "def level_of(code, planes_ptr):",
        "    low = (tl.load(planes_ptr + (code >> 2)) >> ((code & 3) * 8)) & 255",
        "    high = (tl.load(planes_ptr + 4 + (code >> 2)) >> ((code & 3) * 8)) & 255",
        f"    return (low | (high << 8)).to(tl.int16).to({half.triton}, bitcast=True)",
        "",
        "",
        "@triton.jit",
        f"def decode_0(w0, planes_ptr, {planes}, PTX: tl.constexpr):",
        "    if PTX:",
        f"        return {_table_program(half)}",
        f"    return {', '.join(f'level_of({code}, planes_ptr)' for code in codes)}",
    ]
    # Tiles of one number: behind a splat, words would not be decoded in the registers where the product wants them.
    before = ["one = tl.zeros((1, 1), tl.int32)", *(f"plane{i} = tl.load(planes_ptr + {i} + one)" for i in range(8))]
    return "\n".join(lines), [f"f0, f1, f2, f3 = decode_0(w0, planes_ptr, {planes}, PTX)"], before


def _table_program(half: Half) -> str:
    program = Program(half, 4)
    word = program.word(0)
    planes = [program.tile(f"plane{i}") for i in range(8)]
    # Bytes of the two rows side by side: fields 0 and 1 of both in the low half, 2 and 3 in the high half.
    codes = program.fresh(f"prmt.b32 @, {word}, {word}, 0x3120;")
    select = program.fresh(f"and.b32 @, {codes}, 0x77777777;")
    upper = program.fresh(f"shr.u32 @, {codes}, 1;")
    merge = program.fresh(f"lop3.b32 @, {upper}, 0x44444444, 0x32103210, 0xea;")
    results = []
    for shift in (0, 16):
        if shift:
            select = program.fresh(f"shr.u32 @, {select}, 16;")
            merge = program.fresh(f"shr.u32 @, {merge}, 16;")
        found = []
        for table in (planes[:4], planes[4:]):
            first = program.fresh(f"prmt.b32 @, {table[0]}, {table[1]}, {select};")
            second = program.fresh(f"prmt.b32 @, {table[2]}, {table[3]}, {select};")
            found.append(program.fresh(f"prmt.b32 @, {first}, {second}, {merge};"))
        results += [program.fresh(f"prmt.b32 @, {found[0]}, {found[1]}, {order};") for order in ("0x6240", "0x7351")]
    return program.call(results, tile_registers=2)


def decode_floats(dtype: torch.dtype, half: Half | None) -> tuple[str, list[str]]:
    """Text of the function for codes that are 8-bit floats, two to a word, and the line that calls it.

    Sign, exponent and mantissa are moved to where the wider type has them; what its larger bias makes of that is
    undone by a power of two.
    """
    mantissa, bias = (3, 7) if dtype == torch.float8_e4m3fn else (2, 15)
    plain = ", ".join(_plain_float(8 * j, mantissa, bias, half) for j in range(2))
    lines = ["@triton.jit", "def decode_0(w0, PTX: tl.constexpr):"]
    if half is not None:
        lines += ["    if PTX:", f"        return {_float_program(half, mantissa, bias)}"]
    return "\n".join([*lines, f"    return {plain}"]), ["f0, f1 = decode_0(w0, PTX)"]


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
