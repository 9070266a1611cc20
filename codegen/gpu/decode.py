"""From words to levels: the text of functions that turn tiles of words into tiles of 16-bit numbers, one per field.

Each function has two forms with equal results, chosen by the constant PTX. The first is PTX on registers that hold two
neighbouring rows: where a 16-bit float has u + 0 with the mantissa free (u = 1024 in float16, 128 in bfloat16), or-ing
bits into the mantissa makes the number u + bits * 2^offset, so a masked field becomes a float in one instruction and
loses u in another, which subtracts the zero as well:

    level = (u + code * 2^o) * 2^-o + (-(u * 2^-o) - zero)              lop3, fma.f16x2    (two weights)

(Kim, Henry, Fahim, Hassan Awadalla 2022, arXiv:2211.10017; Frantar et al. 2024, MARLIN, arXiv:2408.11743.) Tables of 16
levels are looked up with byte permutations, one for the low and one for the high bytes of the levels. The second form
is plain Triton, for the interpreter and for other makers' GPUs.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ptqc.codegen.gpu.words import Piece, WordLayout

__all__ = ["HALVES", "Half", "Subtracted", "byte_planes", "decode_floats", "decode_integers", "decode_table"]

_LONGEST = 4
"""Fields decoded by one function: more would hold too many registers at a time."""


@dataclass(frozen=True, slots=True)
class Half:
    """A 16-bit float. unit: the power of two whose numbers have their last bit worth 1; magic: its bits."""

    triton: str
    suffix: str
    mantissa: int
    magic: int

    @property
    def unit(self) -> int:
        """The number that an empty mantissa stands for."""
        return 1 << self.mantissa

    def bits(self, value: float) -> int:
        """The bits of a number that this type holds exactly."""
        if self.suffix == "f16x2":
            return int.from_bytes(struct.pack("<e", value), "little")
        return int.from_bytes(struct.pack("<f", value)[2:], "little")

    def pair(self, value: float) -> str:
        """A register with the number in both halves."""
        return f"0x{self.bits(value) * 0x10001:08x}"


HALVES: dict[torch.dtype, Half] = {
    torch.float16: Half("tl.float16", "f16x2", 10, 0x6400),
    torch.bfloat16: Half("tl.bfloat16", "bf16x2", 7, 0x4300),
}


@dataclass(frozen=True, slots=True)
class Subtracted:
    """What is taken from a code: a constant, or the tile z [outputs, 1] float32, which may hold fractions."""

    constant: int = 0
    is_tile: bool = False
    has_fractions: bool = False


@dataclass
class _Program:
    """PTX under construction: registers that hold shifted words, constants, and the tiles it takes in."""

    half: Half
    outputs: int
    words: list[int] = field(default_factory=list)
    tiles: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)

    def word(self, index: int) -> str:
        """The operand that holds a word; words come before tiles."""
        if index not in self.words:
            self.words.append(index)
        return f"$w{index}"

    def tile(self, expression: str) -> str:
        """The operand that holds a tile given by a Triton expression."""
        if expression not in self.tiles:
            self.tiles.append(expression)
        return f"$t{self.tiles.index(expression)}"

    def once(self, key: str, instruction: str) -> str:
        """A register computed the first time that it is asked for."""
        if key not in self.registers:
            self.registers[key] = f"r{len(self.registers)}"
            self.lines.append(instruction.replace("@", self.registers[key]))
        return self.registers[key]

    def fresh(self, instruction: str) -> str:
        """A register of its own."""
        return self.once(f"fresh {len(self.registers)}", instruction)

    def number(self, value: float) -> str:
        """A register with a constant in both halves."""
        bits = self.half.pair(value)
        return self.once(bits, f"mov.b32 @, {bits};")

    def shifted(self, word: int, shift: int) -> str:
        """A word shifted right (left if negative)."""
        operand = self.word(word)
        if shift == 0:
            return operand
        verb, by = ("shr", shift) if shift > 0 else ("shl", -shift)
        return self.once(f"{verb} {word} {by}", f"{verb}.b32 @, {operand}, {by};".replace("shr.b32", "shr.u32"))

    def fma(self, a: str, b: str, c: str) -> str:
        """a * b + c."""
        return self.fresh(f"fma.rn.{self.half.suffix} @, {a}, {b}, {c};")

    def add(self, a: str, b: str) -> str:
        """a + b; bfloat16 has an addition from sm_90 on only."""
        if self.half.suffix == "f16x2":
            return self.fresh(f"add.rn.f16x2 @, {a}, {b};")
        return self.fma(a, self.number(1.0), b)

    def call(self, results: Sequence[str], tile_registers: int = 1) -> str:
        """The Triton expression that runs the program and gives the results.

        tile_registers: registers of a tile for two rows, of which the first is read: two if it is 32 bits wide.
        """
        lines = [*self.lines, *(f"mov.b32 ${place}, {result};" for place, result in enumerate(results))]
        asm = "\n".join(["{", *(f".reg .b32 {register};" for register in self.registers.values()), *lines, "}"])
        tiles = self.outputs + len(self.words)
        places = {f"$w{word}": self.outputs + i for i, word in enumerate(self.words)}
        places |= {f"$t{i}": tiles + i * tile_registers for i in range(len(self.tiles))}
        for operand, place in places.items():
            asm = asm.replace(f"{operand},", f"${place},").replace(f"{operand};", f"${place};")
        inputs = len(self.words) + len(self.tiles) * tile_registers
        constraints = ",".join(["=r"] * self.outputs + ["r"] * inputs)
        types = f"({', '.join([self.half.triton] * self.outputs)})" if self.outputs > 1 else self.half.triton
        arguments = ", ".join([f"w{word}" for word in self.words] + self.tiles)
        text = asm.replace("\n", "\n            ")
        return (
            f'tl.inline_asm_elementwise("""{text}""",\n            "{constraints}", [{arguments}], '
            f"dtype={types}, is_pure=True, pack=2)"
        )


# -------------------------------------------------------------------- integers


def decode_integers(
    layout: WordLayout, bits: int, half: Half | None, subtracted: Subtracted, fields_per_scale: int
) -> tuple[str, list[str]]:
    """Text of the functions for integer codes, and the lines that call them: f0, f1, .. from w0, w1, .. and z0, z1, ..

    half: type of the levels, None for float32. fields_per_scale: fields that share a zero; field j subtracts
    z<j // fields_per_scale>.
    """
    longest = min(_LONGEST, fields_per_scale) if subtracted.is_tile else _LONGEST
    functions, calls = [], []
    plans = None if half is None else _plans(layout, half)
    for first in range(0, layout.fields, longest):
        fields = range(first, min(first + longest, layout.fields))
        pieces = [layout.pieces[j] for j in fields]
        words = sorted({piece.word for codes in pieces for piece in codes})
        zero = f"z{first // fields_per_scale}" if subtracted.is_tile else ""
        name = f"decode_{first}"
        parts = _zero_parts(subtracted, bits, half)
        program = "" if half is None or plans is None else _integer_program(
            [plans[j] for j in fields], half, subtracted, list(parts), bits
        )
        functions.append(_integer_function(name, pieces, words, parts, half, subtracted, program))
        arguments = [f"w{word}" for word in words] + ([zero] if zero else [])
        calls.append(f"{', '.join(f'f{j}' for j in fields)} = {name}({', '.join(arguments)}, PTX)")
    return "\n\n\n".join(functions), calls


def _integer_function(
    name: str, fields: Sequence[Sequence[Piece]], words: Sequence[int], parts: Mapping[str, str], half: Half | None,
    zero: Subtracted, program: str,
) -> str:  # fmt: skip
    arguments = ", ".join([*(f"w{word}" for word in words), *(["z"] if zero.is_tile else [])])
    lines = ["@triton.jit", f"def {name}({arguments}, PTX: tl.constexpr):"]
    lines += [f"    {part} = {expression}" for part, expression in parts.items()]
    minus = "".join(f" + {part}" for part in parts) if zero.is_tile else f" - {float(zero.constant)}"
    kind = half.triton if half else "tl.float32"
    plain = ", ".join(f"(({_code_expression(pieces)}).to(tl.float32){minus}).to({kind})" for pieces in fields)
    if program:
        lines += ["    if PTX:", f"        return {program}"]
    return "\n".join([*lines, f"    return {plain}"])


def _zero_parts(zero: Subtracted, bits: int, half: Half | None) -> dict[str, str]:
    """Named float32 tiles whose sum is minus the zero, each exact in the type of the levels but the last."""
    if not zero.is_tile:
        return {}
    if half is None or not zero.has_fractions:
        return {"whole": "-z"}
    rounded = f"(tl.minimum(tl.maximum(tl.floor(z + 0.5), 0.0), {float((1 << bits) - 1)}))"
    if half.suffix == "f16x2":
        return {"rest": f"(-z).to({half.triton}).to(tl.float32)"}
    return {"whole": f"-{rounded}", "rest": f"(-whole - z).to({half.triton}).to(tl.float32)"}


def _code_expression(pieces: Sequence[Piece]) -> str:
    terms = []
    for piece in pieces:
        bits = f"((w{piece.word} >> {piece.bit}) & {(1 << piece.width) - 1})"
        terms.append(f"({bits} << {piece.base})" if piece.base else bits)
    return " | ".join(terms)


@dataclass(frozen=True)
class _Placed:
    """A piece of a code in a mantissa: `word` shifted right by `shift`, and masked; what one step of the mantissa is
    worth; is_merged: what or-ing adds to it is taken away with the zero."""

    word: int
    shift: int
    mask: int
    step: float
    is_merged: bool


def _plans(layout: WordLayout, half: Half) -> list[list[_Placed]]:
    """How every field gets into mantissas, with few shifts in all: assemblers find equal ones across functions."""
    shifts: dict[int, set[int]] = {}
    return [_plan(pieces, half, shifts) for pieces in layout.pieces]


def _plan(pieces: Sequence[Piece], half: Half, shifts: dict[int, set[int]]) -> list[_Placed]:
    placed: list[_Placed] = []
    for piece in _narrow(pieces, half):
        highest = half.mantissa - piece.width
        is_merged = not placed or piece.base <= highest
        lowest = piece.base if placed and is_merged else 0
        known = shifts.setdefault(piece.word, {0})
        allowed = range(piece.bit - highest, piece.bit - lowest + 1)
        # A new shift brings this field as low as may be: the fields above it then fit behind it.
        shift = next((shift for shift in allowed if shift in known), allowed[-1])
        known.add(shift)
        offset = piece.bit - shift
        mask = ((1 << piece.width) - 1) << offset
        placed.append(_Placed(piece.word, shift, mask, 2.0 ** (piece.base - offset), is_merged))
    return placed


def _excess(plan: Sequence[_Placed], half: Half) -> float:
    """What the sum of the merged pieces is too large by."""
    return sum(half.unit * piece.step for piece in plan if piece.is_merged)


def _integer_program(
    plans: Sequence[Sequence[_Placed]], half: Half, zero: Subtracted, parts: Sequence[str], bits: int
) -> str:
    program = _Program(half, len(plans))
    excesses = {_excess(plan, half) for plan in plans}
    is_merged = parts[:1] == ["whole"] and len(excesses) <= 2 and max(excesses) + (1 << bits) <= 2 * half.unit
    return program.call([_field(program, plan, zero, parts, is_merged) for plan in plans])


def _field(
    program: _Program, plan: Sequence[_Placed], zero: Subtracted, parts: Sequence[str], is_merged: bool
) -> str:
    half, total = program.half, ""
    excess = _excess(plan, half)
    for piece in plan:
        word = program.shifted(piece.word, piece.shift)
        register = program.fresh(
            f"lop3.b32 @, {word}, 0x{piece.mask * 0x10001:08x}, 0x{half.magic * 0x10001:08x}, 0xea;"
        )
        if not total:
            minus = f"(whole - {excess}).to({half.triton})" if is_merged else ""
            number = -(excess + (0 if zero.is_tile else zero.constant))
            total = program.tile(minus) if minus else program.number(number)
        if not piece.is_merged:
            register = program.add(register, program.number(-float(half.unit)))
        if piece.step == 1.0:
            total = program.add(register, total)
        else:
            total = program.fma(register, program.number(piece.step), total)
    for part in parts[1:] if is_merged else parts:
        total = program.add(total, program.tile(f"{part}.to({half.triton})"))
    return total


def _narrow(pieces: Sequence[Piece], half: Half) -> list[Piece]:
    """Pieces cut to what fits into a mantissa."""
    narrow = []
    for piece in pieces:
        widest = piece.width if piece.width <= half.mantissa else 4
        narrow += [Piece(piece.word, piece.bit + at, min(widest, piece.width - at), piece.base + at)
                   for at in range(0, piece.width, widest)]  # fmt: skip
    return narrow


# -------------------------------------------------------------------- tables of 16 levels


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
    program = _Program(half, 4)
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


# -------------------------------------------------------------------- 8-bit floats


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
    program = _Program(half, 2)
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
