"""From words to levels: the text of functions that turn tiles of words into tiles of 16-bit numbers, one per field.

Each function has two forms with equal results, chosen by the constant PTX. The first is PTX on registers that hold two
neighbouring rows: where a 16-bit float has u + 0 with the mantissa free (u = 1024 in float16, 128 in bfloat16), or-ing
bits into the mantissa makes the number u + bits * 2^offset, so a masked field becomes a float in one instruction and
loses u in another, which subtracts the zero as well:

    level = (u + code * 2^o) * 2^-o + (-(u * 2^-o) - zero)              lop3, fma.f16x2    (two weights)

(Kim, Henry, Fahim, Hassan Awadalla 2022, arXiv:2211.10017; Frantar et al. 2024, MARLIN, arXiv:2408.11743.) The
second form is plain Triton, for the interpreter and for other makers' GPUs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log2

from ptqc.codegen.gpu.ptx import Half, Program
from ptqc.codegen.gpu.words import Piece, WordLayout

__all__ = ["Placed", "Subtracted", "code_expression", "decode_integers", "joined", "place_fields"]

_LONGEST = 4
"""Fields decoded by one function: more would hold too many registers at a time."""


@dataclass(frozen=True, slots=True)
class Subtracted:
    """What is taken from a code: a constant, or the tile z [outputs, 1] float32, which may hold fractions."""

    constant: int = 0
    is_tile: bool = False
    has_fractions: bool = False


def decode_integers(
    layout: WordLayout, bits: int, half: Half | None, subtracted: Subtracted, fields_per_scale: int
) -> tuple[str, list[str]]:
    """Text of the functions for integer codes, and the lines that call them: f0, f1, .. from w0, w1, .. and z0, z1, ..

    half: type of the levels, None for float32. fields_per_scale: fields that share a zero; field j subtracts
    z<j // fields_per_scale>.
    """
    longest = min(_LONGEST, fields_per_scale) if subtracted.is_tile else _LONGEST
    functions, calls = [], []
    plans = None if half is None else place_fields(layout, half)
    for first in range(0, layout.fields, longest):
        fields = range(first, min(first + longest, layout.fields))
        pieces = [layout.pieces[j] for j in fields]
        words = sorted({piece.word for codes in pieces for piece in codes})
        zero = f"z{first // fields_per_scale}" if subtracted.is_tile else ""
        name = f"decode_{first}"
        parts = _zero_parts(subtracted, bits, half)
        program = (
            ""
            if half is None or plans is None
            else _integer_program([plans[j] for j in fields], half, subtracted, list(parts), bits)
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
    plain = ", ".join(f"(({code_expression(pieces)}).to(tl.float32){minus}).to({kind})" for pieces in fields)
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


def code_expression(pieces: Sequence[Piece]) -> str:
    """The code of a field, in plain Triton."""
    terms = []
    for piece in pieces:
        bits = f"((w{piece.word} >> {piece.bit}) & {(1 << piece.width) - 1})"
        terms.append(f"({bits} << {piece.base})" if piece.base else bits)
    return " | ".join(terms)


@dataclass(frozen=True)
class Placed:
    """A piece of a code in a mantissa: `word` shifted right by `shift`, and masked; what one step of the mantissa is
    worth; is_merged: what or-ing adds to it is taken away with the zero. Pieces of a field with equal steps are or-ed
    into one number."""

    word: int
    shift: int
    mask: int
    step: float
    is_merged: bool


def place_fields(layout: WordLayout, half: Half, highest_offset: int | None = None) -> list[list[Placed]]:
    """How every field gets into mantissas, with few shifts in all: assemblers find equal ones across functions.

    highest_offset: how far above the place where it counts as much as in its code a field may lie.
    """
    shifts: dict[int, set[int]] = {}
    return [_plan(pieces, half, shifts, highest_offset) for pieces in layout.pieces]


def _plan(
    pieces: Sequence[Piece], half: Half, shifts: dict[int, set[int]], highest_offset: int | None
) -> list[Placed]:
    placed: list[Placed] = []
    for piece in _narrow(pieces, half):
        highest = half.mantissa - piece.width
        is_merged = not placed or piece.base <= highest
        lowest = piece.base if placed and is_merged else 0
        if highest_offset is not None:
            highest = min(highest, piece.base + highest_offset)
        known = shifts.setdefault(piece.word, {0})
        allowed = range(piece.bit - highest, piece.bit - lowest + 1)
        beside = piece.bit - round(piece.base - log2(placed[0].step)) if placed else None
        equal, shared = ([at for at in allowed if at in wanted] for wanted in ({beside}, known))
        # A new shift brings this field as low as may be: the fields above it then fit behind it.
        shift = (equal or shared or allowed[-1:])[0]
        known.add(shift)
        offset = piece.bit - shift
        mask = ((1 << piece.width) - 1) << offset
        placed.append(Placed(piece.word, shift, mask, 2.0 ** (piece.base - offset), is_merged))
    return placed


def joined(plan: Sequence[Placed]) -> list[list[Placed]]:
    """Pieces by the number that they are or-ed into: those of equal steps."""
    return [list(pieces) for _, pieces in groupby(plan, lambda piece: (piece.step, piece.is_merged))]


def _excess(plan: Sequence[Placed], half: Half) -> float:
    """What the sum of the merged pieces is too large by."""
    return sum(half.unit * pieces[0].step for pieces in joined(plan) if pieces[0].is_merged)


def _integer_program(
    plans: Sequence[Sequence[Placed]], half: Half, zero: Subtracted, parts: Sequence[str], bits: int
) -> str:
    program = Program(half, len(plans))
    excesses = {_excess(plan, half) for plan in plans}
    is_merged = parts[:1] == ["whole"] and len(excesses) <= 2 and max(excesses) + (1 << bits) <= 2 * half.unit
    return program.call([_field(program, plan, zero, parts, is_merged) for plan in plans])


def _field(program: Program, plan: Sequence[Placed], zero: Subtracted, parts: Sequence[str], is_merged: bool) -> str:
    half, total = program.half, ""
    excess = _excess(plan, half)
    for pieces in joined(plan):
        register = f"0x{half.magic * 0x10001:08x}"
        for piece in pieces:
            word = program.shifted(piece.word, piece.shift)
            register = program.fresh(f"lop3.b32 @, {word}, 0x{piece.mask * 0x10001:08x}, {register}, 0xea;")
        if not total:
            minus = f"(whole - {excess}).to({half.triton})" if is_merged else ""
            number = -(excess + (0 if zero.is_tile else zero.constant))
            total = program.tile(minus) if minus else program.number(number)
        if not pieces[0].is_merged:
            register = program.add(register, program.number(-float(half.unit)))
        if pieces[0].step == 1.0:
            total = program.add(register, total)
        else:
            total = program.fma(register, program.number(pieces[0].step), total)
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
