"""Bit orders of stored codes, as pairs of exact inverses.

`linear` is one little-endian bit stream per row: code k occupies bits [k*bits, (k+1)*bits), least significant
first, and each row is padded to whole bytes; codes wider than 8 bits are whole bytes. `base3` puts five ternary digits
into a byte (3^5 = 243). Codes that are floats (fp8) are stored as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["PACKINGS", "Packing", "pack_base3", "pack_linear", "unpack_base3", "unpack_linear"]


def pack_linear(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into a bit stream.

    codes: [..., n] uint8 below 2**bits, 1 <= bits <= 8, or int64 where bits is 16, 24 or 32.
    Returns [..., ceil(n * bits / 8)] uint8.
    """
    if bits > 8:
        return torch.stack([(codes >> shift & 255).to(torch.uint8) for shift in range(0, bits, 8)], -1).flatten(-2)
    if bits == 8:
        return codes.contiguous()
    n = codes.shape[-1]
    eights = pad(codes, (0, -n % 8)).unflatten(-1, (-1, 8))
    # Eight codes fill `bits` bytes exactly, so code k starts in byte k*bits//8 and may spill into the next one.
    packed = torch.zeros(*eights.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for k in range(8):
        byte, shift = divmod(k * bits, 8)
        packed[..., byte] |= eights[..., k] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., k] >> (8 - shift)
    return packed.flatten(-2)[..., : -(-n * bits // 8)].contiguous()


def unpack_linear(packed: Tensor, bits: int, n: int) -> Tensor:
    """Invert `pack_linear`. packed: [..., bytes] uint8. Returns [..., n] uint8, int64 above 8 bits."""
    if bits > 8:
        places = packed.unflatten(-1, (n, bits // 8)).unbind(-1)
        wide: Tensor = sum(place.long() << 8 * k for k, place in enumerate(places))
        return wide
    if bits == 8:
        return packed
    groups = -(-n // 8)
    stream = pad(packed, (0, groups * bits - packed.shape[-1])).unflatten(-1, (groups, bits))
    mask = (1 << bits) - 1
    columns = []
    for k in range(8):
        byte, shift = divmod(k * bits, 8)
        column = stream[..., byte] >> shift
        if shift + bits > 8:
            column = column | (stream[..., byte + 1] << (8 - shift))
        columns.append(column & mask)
    codes: Tensor = torch.stack(columns, dim=-1).flatten(-2)[..., :n]
    return codes


def pack_base3(codes: Tensor, bits: int) -> Tensor:
    """Pack ternary digits, five to a byte, first digit least significant. codes: [..., n] uint8 in 0..2."""
    fives = pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5))
    packed: Tensor = (fives * _places(codes)).sum(-1, dtype=torch.uint8)
    return packed


def unpack_base3(packed: Tensor, bits: int, n: int) -> Tensor:
    """Invert `pack_base3`. packed: [..., ceil(n / 5)] uint8. Returns [..., n] uint8."""
    codes: Tensor = (packed.unsqueeze(-1) // _places(packed) % 3).flatten(-2)[..., :n]
    return codes


def _places(like: Tensor) -> Tensor:
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=like.device)


def _as_is(codes: Tensor, bits: int) -> Tensor:
    return codes.contiguous()


def _as_was(packed: Tensor, bits: int, n: int) -> Tensor:
    return packed


@dataclass(frozen=True, slots=True)
class Packing:
    """pack(codes, bits) and unpack(packed, bits, n) are inverses; `per_byte` codes share a byte where it is fixed."""

    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int], Tensor]
    per_byte: int | None = None

    def row_bytes(self, bits: int, n: int) -> int:
        """Bytes of a row of n codes."""
        return -(-n // self.per_byte) if self.per_byte else -(-n * bits // 8)

    def bits_per_code(self, bits: int) -> float:
        """Bits of one code in a long row."""
        return 8 / self.per_byte if self.per_byte else bits


PACKINGS: dict[str, Packing] = {
    "linear": Packing(pack_linear, unpack_linear),
    "base3": Packing(pack_base3, unpack_base3, per_byte=5),
    "float": Packing(_as_is, _as_was, per_byte=1),
}
