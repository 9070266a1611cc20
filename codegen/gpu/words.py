"""Where the codes of a weight lie in memory: 16-bit words, transposed, several inputs far apart in one word.

A block is `fields * rows` inputs of one output. Field j of row r is input k = rows * j + r (for codes of eight weights
k = 8 * r + j), and the same rows of all fields share words:

    4 bits, rows 32        bits 15..12   11..8    7..4     3..0
    word r of a block      k = 96 + r    64 + r   32 + r   r

The words of all outputs lie side by side: stored [blocks * words * rows, outputs] int16. So a tile of words is read in
runs of outputs, a tensor core gets its operand from it without a shuffle (two neighbouring rows fill a register of
two 16-bit numbers), and one mask yields one field of both. Widths that do not divide 16 are cut into planes that do:
3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2; 7 is stored as 8. Where the first plane has field j at bit b of its word q, the second
has it at b + q * width: all fields of a word then meet their upper bits by the same shift.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["FEWEST_ROWS", "Piece", "WordLayout", "pack_words", "unpack_words", "word_layout"]

_PLANES: dict[int, tuple[int, ...]] = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (8,), 8: (8,),
}  # fmt: skip
"""By width of a code: widths of its planes, lowest bits first."""

_INPUTS_PER_BLOCK = 256
_BITS_PER_BLOCK = 4 * _INPUTS_PER_BLOCK
"""Blocks of short groups are repeated up to this: a step of the loop is then as long as that of longer groups."""
_MOST_ROWS = 64
FEWEST_ROWS = 16
"""What a tensor core multiplies at a time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bits base .. base + width - 1 of a code are bits bit .. bit + width - 1 of word `word`."""

    word: int
    bit: int
    width: int
    base: int


@dataclass(frozen=True, slots=True)
class WordLayout:
    """fields: codes in the same rows of words; words: how many words of a row they fill; pieces: by field."""

    rows: int
    words: int
    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def fields(self) -> int:
        """Codes that share the words of a row."""
        return len(self.pieces)

    @property
    def block(self) -> int:
        """Inputs of a block."""
        return self.fields * self.rows

    def rows_for(self, inputs: int) -> int:
        """Rows of a step that takes about so many inputs."""
        return min(self.rows, max(inputs // self.fields, FEWEST_ROWS))


def word_layout(bits: int, group: int | None) -> WordLayout | str:
    """The layout of codes of `bits` bits in groups, None for whole rows; or the reason why there is none.

    >>> layout = word_layout(3, 64)
    >>> layout.fields, layout.words, layout.rows
    (16, 3, 16)
    """
    planes = _PLANES[bits]
    fields = 16 // min(planes)
    pieces: list[list[Piece]] = [[] for _ in range(fields)]
    words = base = 0
    for width in planes:
        for field in range(fields):
            word, bit = divmod(field * width, 16)
            if pieces[field]:
                word, bit = 0, pieces[field][0].bit + pieces[field][0].word * width
            pieces[field].append(Piece(words + word, bit, width, base))
        words, base = words + fields * width // 16, base + width
    rows = _longest_rows(fields)
    while group is not None and group % rows and rows > FEWEST_ROWS:
        rows //= 2
    if group is not None and group % rows:
        return f"tensor cores multiply {FEWEST_ROWS} inputs at a time, which do not divide group {group}"
    repeats = _repeats(words * 16 * rows, fields * rows) if rows < _longest_rows(fields) else 1
    repeated = [tuple(replace(piece, word=piece.word + words * at) for piece in field)
                for at in range(repeats) for field in pieces]  # fmt: skip
    return WordLayout(rows, words * repeats, tuple(repeated))


def _longest_rows(fields: int) -> int:
    return min(_INPUTS_PER_BLOCK // fields, _MOST_ROWS)


def _repeats(bits: int, inputs: int) -> int:
    return max(1, min(_BITS_PER_BLOCK // bits, _INPUTS_PER_BLOCK // inputs))


def pack_words(codes: Tensor, layout: WordLayout, outputs: int) -> Tensor:
    """Lay out codes [out, in] uint8 as words [blocks * words * rows, outputs] int16, filled up with zeros."""
    out_features, in_features = codes.shape
    filled = pad(codes, (0, -in_features % layout.block, 0, outputs - out_features))
    fields = filled.T.reshape(-1, layout.fields, layout.rows, outputs)
    packed = torch.zeros(len(fields), layout.words, layout.rows, outputs, dtype=torch.int32, device=codes.device)
    for field, pieces in enumerate(layout.pieces):
        for piece in pieces:
            bits = (fields[:, field].int() >> piece.base) & ((1 << piece.width) - 1)
            packed[:, piece.word] |= bits << piece.bit
    return packed.to(torch.int16).view(-1, outputs)


def unpack_words(words: Tensor, layout: WordLayout, outputs: Tensor, inputs: int) -> Tensor:
    """Codes [outputs, inputs] uint8 of some outputs: `pack_words` backwards."""
    packed = words.view(-1, layout.words, layout.rows, words.shape[1]).index_select(3, outputs).int()
    fields = torch.zeros(len(packed), layout.fields, layout.rows, len(outputs), dtype=torch.uint8, device=words.device)
    for field, pieces in enumerate(layout.pieces):
        for piece in pieces:
            bits = packed[:, piece.word] >> piece.bit & ((1 << piece.width) - 1)
            fields[:, field] |= (bits << piece.base).to(torch.uint8)
    return fields.reshape(-1, len(outputs)).T[:, :inputs].contiguous()
