"""Codebooks: what level each code stands for when the levels are not evenly spaced.

A codebook is a row of the table `CODEBOOKS`; integer specs have none. NF4: Dettmers et al. 2023,
arXiv:2305.14314, appendix E (quantiles of a standard normal, scaled to [-1, 1]). FP4 and E2M1: four-bit floats,
in the order of bitsandbytes and of the OCP MX specification. IQ4_NL: the table of llama.cpp. Codes of the E8 lattices
stand for eight weights each: `ptqc.lattice`.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ptqc.errors import SpecError
from ptqc.lattice import LATTICES, Lattice

__all__ = ["CODEBOOKS", "Codebook", "codebook", "dynamic_map", "nearest_codes"]

_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # twelfths
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Codebook:
    """bits: width of a code; levels: value of each code.

    levels are () where the code *is* a float of `float_dtype`, and where it stands for a point of a `lattice`.
    """

    name: str
    bits: int
    levels: tuple[float, ...] = ()
    float_dtype: torch.dtype | None = None
    scale_dtype: str = "f16"
    """Stored type of the scales when a spec with this codebook does not say."""
    lattice: Lattice | None = None

    @property
    def vector(self) -> int:
        """Weights that a code stands for."""
        return 1 if self.lattice is None else 8

    @property
    def largest(self) -> float:
        """Largest magnitude of a level: what the largest weight of a group is mapped to."""
        if self.float_dtype is not None:
            return float(torch.finfo(self.float_dtype).max)
        if self.lattice is not None:
            return self.lattice.largest
        return max(abs(level) for level in self.levels)

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The levels as float32, indexed by code.

        Raises: SpecError for a codebook whose codes are floats themselves, or points of a lattice.
        """
        if self.lattice is not None:
            raise SpecError(f"codebook {self.name!r} has no table of levels: its codes stand for eight weights each")
        if not self.levels:
            raise SpecError(f"codebook {self.name!r} has no table: its codes are {self.float_dtype} values")
        return torch.tensor(self.levels, dtype=torch.float32, device=device)


def _signed(magnitudes: tuple[float, ...], unit: float) -> tuple[float, ...]:
    return tuple(m / unit for m in magnitudes) + tuple(-m / unit for m in magnitudes)


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_IQ4_NL = (-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

CODEBOOKS: dict[str, Codebook] = {
    book.name: book
    for book in (
        Codebook("nf4", 4, _NF4, scale_dtype="f32"),
        Codebook("fp4", 4, _signed(_FP4_MAGNITUDES, 12.0), scale_dtype="f32"),
        Codebook("e2m1", 4, _signed(_E2M1_MAGNITUDES, 1.0)),
        Codebook("iq4nl", 4, _IQ4_NL),
        Codebook("ternary", 2, (-1.0, 0.0, 1.0)),
        Codebook("fp8e4m3", 8, float_dtype=torch.float8_e4m3fn, scale_dtype="f32"),
        Codebook("fp8e5m2", 8, float_dtype=torch.float8_e5m2, scale_dtype="f32"),
        *(Codebook(name, lattice.bits, lattice=lattice) for name, lattice in LATTICES.items()),
    )
}


def codebook(name: str) -> Codebook:
    """The codebook called `name`.

    Raises: SpecError naming the known ones.
    """
    if name not in CODEBOOKS:
        raise SpecError(f"no codebook is called {name!r}; known: {', '.join(sorted(CODEBOOKS))}")
    return CODEBOOKS[name]


def nearest_codes(values: Tensor, levels: Tensor) -> Tensor:
    """Code of the level nearest to each value; on a tie the lower level wins.

    values: any shape, float. levels: [codes] float, in any order. Returns uint8, shape of `values`.
    """
    sorted_levels, order = levels.sort()
    midpoints = (sorted_levels[1:] + sorted_levels[:-1]) / 2
    return order.to(torch.uint8)[torch.bucketize(values.contiguous(), midpoints)]


@cache
def dynamic_map() -> Tensor:
    """The 256 levels of the signed 8-bit dynamic type, sorted, float32.

    Decades 1e-6 to 1 with 1, 2, 4 .. 64 levels each: one sign bit, a unary exponent, a linear fraction
    (Dettmers 2015, arXiv:1511.04561; double quantization of QLoRA stores absmax in it).
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        centres = (edges[:-1] + edges[1:]) / 2
        levels += [sign * value for value in (10 ** (exponent - 6) * centres).tolist() for sign in (1.0, -1.0)]
    return torch.tensor(sorted(levels), dtype=torch.float32)
