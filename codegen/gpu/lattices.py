"""Codes that stand for eight weights (`ptqc.lattice`): words are codes, two table look-ups give eight nibbles.

    nibbles = magnitudes[code >> 8] ^ signs[code & 255]      nibble i - 8 = twice the weight i, but for the shift
    level i = nibble i - 8 +- 1/2                            by bit 0: twice the weight

The nibbles are decoded as 4-bit integers. Field j of row r is input 8 r + j of its block. A second stage of 8 or 16
bits lies in a word of its own and is added in its unit; one of 8 bits has a table of all its points.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqc.codegen.gpu.decode import Subtracted, decode_integers
from ptqc.codegen.gpu.ptx import Half
from ptqc.codegen.gpu.words import WordLayout, word_layout
from ptqc.lattice import Lattice, Stage

__all__ = ["decode_lattice", "lattice_codes", "lattice_layout", "lattice_tables", "lattice_words"]

_ROWS = 16
_FLIP = 0xE
"""8 + m and 8 - m differ in these bits for m = 1, 3, 5."""


def lattice_layout(lattice: Lattice, group: int | None) -> WordLayout | str:
    """One word for each stage; or the reason why groups cannot have one."""
    if group is not None and group % (8 * _ROWS):
        return f"tensor cores multiply {_ROWS} codes of eight weights at a time, which do not divide group {group}"
    return WordLayout(_ROWS, len(lattice.stages), ((),) * 8)


def lattice_words(codes: Tensor, layout: WordLayout, outputs: int) -> Tensor:
    """Lay out codes [out, in // 8] int64 as words [blocks * stages * rows, outputs] int16."""
    filled = pad(codes, (0, -codes.shape[1] % layout.rows, 0, outputs - codes.shape[0])).T
    rows = filled.reshape(-1, 1, layout.rows, outputs)
    stages = [(rows >> 16 * stage & 0xFFFF).to(torch.int32) for stage in range(layout.words)]
    return torch.cat(stages, 1).to(torch.int16).reshape(-1, outputs)


def lattice_codes(words: Tensor, layout: WordLayout, outputs: Tensor, count: int) -> Tensor:
    """Codes [outputs, count] int64 of some outputs: `lattice_words` backwards."""
    packed = words.view(-1, layout.words, layout.rows, words.shape[1]).index_select(3, outputs).long() & 0xFFFF
    places = 16 * torch.arange(layout.words, device=words.device)[:, None, None]
    return (packed << places).sum(1).reshape(-1, len(outputs)).T[:, :count].contiguous()


def lattice_tables(lattice: Lattice) -> Mapping[str, Tensor]:
    """Tables [256] int32 by the name of their pointer: eight nibbles, the first lowest."""
    tables = {}
    for stage in lattice.stages:
        points = torch.from_numpy(stage.points())
        if stage.bits == 8:
            tables["points_ptr"] = _nibbles((2 * points).int() + 8)
        else:
            codes = torch.arange(256)
            tables["magnitudes_ptr"] = _nibbles((2 * (points[codes << 8] + 0.25)).int() + 8)
            signs = (codes[:, None] >> torch.arange(1, 8)) & 1
            flips = torch.cat([signs, signs.sum(1, keepdim=True) % 2], 1)
            tables["signs_ptr"] = _nibbles(flips.int() * _FLIP)
    return tables


def _nibbles(values: Tensor) -> Tensor:
    packed: Tensor = (values.long() << 4 * torch.arange(8)).sum(1)
    return packed.to(torch.int32)


def decode_lattice(lattice: Lattice, half: Half | None) -> tuple[str, list[str]]:
    """Text of the functions for these codes, and the lines that call them: f0 .. f7, twice the weights, from w0, w1."""
    four = word_layout(4, None)
    assert isinstance(four, WordLayout)
    functions, _ = decode_integers(four, 4, half, Subtracted(8), 4)
    kind = half.triton if half else "tl.float32"
    functions += f"""


@triton.jit
def wide_sum(a, b, factor: tl.constexpr, EMULATED: tl.constexpr):
    # The interpreter holds bfloat16 as integers.
    if EMULATED:
        return (a.to(tl.float32) + b.to(tl.float32) * factor).to({kind})
    return a + b * factor"""
    calls: list[str] = []
    for place, stage in enumerate(lattice.stages):
        calls += _stage_lines(place, stage, kind)
    return functions, calls


def _stage_lines(place: int, stage: Stage, kind: str) -> list[str]:
    word, names = f"w{place}", ["f" if place == 0 else "g", "f"]
    levels = [f"{names[0]}{j}" for j in range(8)]
    if stage.bits == 8:
        lines = [f"nibbles = tl.load(points_ptr + ({word} & 255).to(tl.int32))"]
    else:
        lines = [
            f"nibbles = tl.load(magnitudes_ptr + (({word} >> 8) & 255).to(tl.int32))",
            f"nibbles = nibbles ^ tl.load(signs_ptr + ({word} & 255).to(tl.int32))",
            f"shift = ((({word} & 1) * 2 - 1).to(tl.float32) * 0.5).to({kind})",
        ]
    lines += [
        f"{', '.join(levels[:4])} = decode_0(nibbles.to(tl.int16), PTX)",
        f"{', '.join(levels[4:])} = decode_0((nibbles >> 16).to(tl.int16), PTX)",
    ]
    if stage.bits == 16:
        lines += [f"{level} = wide_sum({level}, shift, 1.0, EMULATED)" for level in levels]
    if place:
        lines += [f"f{j} = wide_sum(f{j}, g{j}, {stage.unit}, EMULATED)" for j in range(8)]
    return lines
