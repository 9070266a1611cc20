"""PTX under construction: programs on pairs of 16-bit floats, inlined into Triton kernels."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["HALVES", "Half", "Program"]


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


@dataclass
class Program:
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
