"""Vector codebooks cut out of the E8 lattice: one code stands for eight weights.

E8P (Tseng, Chee, Sun, Kuleshov, De Sa 2024, QuIP#, arXiv:2402.04396, section 4) has 2^16 points, 2 bits per weight:

    bit     15 ... 8                 7 ... 1                     0
            magnitudes, of 256       signs of weights 6 ... 0    shift: +1/4 if set, else -1/4

The magnitudes are half-integers; with an even sum they and their signs lie in D8 + 1/2, a half of E8. The sign of
weight 7 is the one that makes the sum even. 227 of the 256 are all those of squared norm 10 or less, the rest have
norm 12. We do not follow the paper in which 29 those are, nor in the order of the bits.

More bits are a code for what the first leaves, in units of its own (residual codes): another E8P for 4 bits per
weight, and for 3 bits 256 points of E8 itself: zero, the 240 roots, and 15 of squared norm 4.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["LATTICES", "Lattice", "Stage", "nearest_e8", "nearest_e8p"]

Points = npt.NDArray[np.float32]

_SHORT = 227
"""Magnitudes of E8P with a squared norm of 10 or less: they come in all orders."""
_AT_ONCE = 1 << 14
"""Vectors handled at a time: what is made for them stays in the cache."""


# -------------------------------------------------------------------- points


@cache
def _magnitudes() -> Points:
    """The 256 vectors of magnitudes of E8P, [256, 8]: by norm, then spread evenly over the coordinates."""
    every = np.array(list(itertools.product((0.5, 1.5, 2.5), repeat=8)), dtype=np.float32)
    norms = (every**2).sum(1)
    short = every[norms <= 10]
    long = every[(norms == 12) & (every.max(1) < 2)]
    return np.concatenate([short, long[np.linspace(0, len(long) - 1, 256 - len(short)).round().astype(int)]])


@cache
def _e8p_points() -> Points:
    """All points by code, [65536, 8]."""
    codes = np.arange(1 << 16)
    magnitudes = _magnitudes()[codes >> 8]
    is_negative = (codes[:, None] >> np.arange(1, 8)) & 1
    last = (is_negative.sum(1) + magnitudes.sum(1).astype(int)) % 2
    signs = 1 - 2 * np.concatenate([is_negative, last[:, None]], axis=1)
    points: Points = (signs * magnitudes + (codes[:, None] % 2 - 0.5) / 2).astype(np.float32)
    return points


@cache
def _e8_points() -> Points:
    """256 of the shortest points of E8, [256, 8]."""
    whole = [p for p in itertools.product((-1, 0, 1), repeat=8) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in itertools.product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    twos = np.concatenate([2 * np.eye(8), -2 * np.eye(8)])[:15]
    return np.concatenate([np.array(whole), np.array(halves), twos]).astype(np.float32)


# -------------------------------------------------------------------- nearest points

_PATTERNS = ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1))
"""How many 5/2 and 3/2 there are among eight magnitudes of squared norm 10 or less; the rest are 1/2."""


@cache
def _sorted_patterns() -> Points:
    """The magnitudes of every pattern, largest first, [8, 7]; the last column, of squared norm 12, bounds the rest."""
    rows = [(2.5,) * fives + (1.5,) * threes + (0.5,) * (8 - fives - threes) for fives, threes in (*_PATTERNS, (0, 5))]
    return np.array(rows, dtype=np.float32).T.copy()


@cache
def _index_of_magnitudes() -> npt.NDArray[np.int64]:
    """Index of magnitudes by sum of 3^i times (magnitude of i - 1/2)."""
    index = np.zeros(3**8, dtype=np.int64)
    keys = ((_magnitudes() - 0.5) @ (3.0 ** np.arange(8))).astype(int)
    index[keys] = np.arange(256)
    return index


def nearest_e8p(vectors: Tensor) -> Tensor:
    """Codes of the E8P points nearest to vectors [n, 8] float32. Returns [n] int64.

    For either shift: a point of magnitudes m and signs that agree has distance |y|^2 + |m|^2 - 2 sum |y_i| m_i to y.
    If the parity of the signs forbids that, the cheapest flip costs 4 min |y_i| m_i. Among all orders of the same
    magnitudes the one that is sorted like |y| has the largest sum, and the cheapest flip too, since its smallest
    magnitude meets the smallest |y_i|: of the 227 only seven need a look. The 29 do not come in all orders; they are
    looked at where the best order of theirs would win.
    """
    pieces = [_nearest_of_both_shifts(piece) for piece in vectors.split(_AT_ONCE)]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=vectors.device)


def _nearest_of_both_shifts(vectors: Tensor) -> Tensor:
    n = len(vectors)
    shifted = torch.cat([vectors + 0.25, vectors - 0.25])
    gain, index = _nearest_magnitudes(shifted)
    # The distance to a point p of the shift t is |x|^2 - 2 t sum x + |t|^2 - 2 gain, and |t|^2 the same for both.
    is_up = gain[n:] - gain[:n] > vectors.sum(1) * -0.5
    chosen = torch.arange(n, device=vectors.device) + n * is_up
    places = 2.0 ** torch.arange(1, 9, device=vectors.device)
    places[7] = 0
    signs = _allowed_signs(shifted[chosen], index[chosen]).float() @ places
    return (index[chosen] << 8) + signs.long() + is_up


def _nearest_magnitudes(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Of the nearest signed magnitudes p to vectors y [n, 8]: the gain sum y_i p_i - |p|^2 / 2, and the index."""
    device = vectors.device
    size, is_odd = vectors.abs(), _is_odd(vectors < 0)
    ordered, order = size.sort(dim=1, descending=True)
    patterns = torch.from_numpy(_sorted_patterns()).to(device)
    gains = ordered @ patterns - patterns.square().sum(0) / 2
    gains -= torch.where(is_odd != (patterns.sum(0) % 2 == 1), ordered[:, 7:], 0.0)
    gain, pattern = gains[:, :-1].max(1)
    powers = 3.0 ** torch.arange(8, device=device)
    keys = ((patterns.T - 0.5)[pattern] * powers[order]).sum(1)
    index = torch.from_numpy(_index_of_magnitudes()).to(device)[keys.long()]
    far = (gains[:, -1] > gain).nonzero().squeeze(1)
    longer_gain, longer = _nearest_long(size[far], is_odd[far])
    is_better = longer_gain > gain[far]
    gain[far] = torch.where(is_better, longer_gain, gain[far])
    index[far] = torch.where(is_better, longer, index[far])
    return gain, index


def _nearest_long(size: Tensor, is_odd: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and index of the best of the 29 magnitudes of squared norm 12."""
    magnitudes = torch.from_numpy(_magnitudes()[_SHORT:]).to(size.device)
    cheapest = size[:, :1] * magnitudes[:, 0]
    for i in range(1, 8):
        cheapest = torch.minimum(cheapest, size[:, i : i + 1] * magnitudes[:, i])
    gains = size @ magnitudes.T - 6
    gains -= torch.where(is_odd != (magnitudes.sum(1) % 2 == 1), 2 * cheapest, 0.0)
    gain, index = gains.max(1)
    return gain, index + _SHORT


def _codes_of_e8p(points: Tensor) -> Tensor:
    """Codes [n] int64 of points [n, 8] of E8P. Four times a weight is 2 mod 4, and the shift adds or takes 1."""
    quarters = (4 * points).round().int()
    is_up = (quarters[:, :1] & 3) == 3
    signed = torch.where(is_up, quarters - 1, quarters + 1)
    places = torch.arange(8, device=points.device)
    keys = ((signed.abs() - 2) // 4).long() @ 3**places
    signs = (signed[:, :7] < 0).long() @ (2 << places[:7])
    return (torch.from_numpy(_index_of_magnitudes()).to(points.device)[keys] << 8) + signs + is_up[:, 0]


def _allowed_signs(vectors: Tensor, index: Tensor) -> Tensor:
    """Which weights are negative: as they are, or with the cheapest sign flipped where the sum would be odd."""
    magnitudes = torch.from_numpy(_magnitudes()).to(vectors.device)[index]
    is_negative = vectors < 0
    is_odd = _is_odd(is_negative) != (magnitudes.sum(1, keepdim=True) % 2 == 1)
    flip = (vectors.abs() * magnitudes).argmin(1, keepdim=True)
    return is_negative.scatter(1, flip, is_negative.gather(1, flip) ^ is_odd)


def _is_odd(is_negative: Tensor) -> Tensor:
    return is_negative.float().sum(1, keepdim=True) % 2 == 1


def nearest_e8(vectors: Tensor) -> Tensor:
    """Codes of the nearest of the 256 points of E8 to vectors [n, 8] float32. Returns [n] int64."""
    points = torch.from_numpy(_e8_points()).to(vectors.device)
    half_norms = points.square().sum(1) / 2
    pieces = [(piece @ points.T - half_norms).argmax(1) for piece in vectors.split(_AT_ONCE // 8)]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=vectors.device)


# -------------------------------------------------------------------- stages


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the codes that a vector has: points by code, [2**bits, 8], the search for the nearest, and its unit."""

    bits: int
    points: Callable[[], Points]
    nearest: Callable[[Tensor], Tensor]
    unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Lattice:
    """A codebook of vectors: the sum of the points of its stages, the first in the lowest bits of the code.

    rms: root mean square of normally distributed weights, in units of the scale, for which the squared error is the
    smallest share of theirs.
    """

    stages: tuple[Stage, ...]
    rms: float

    @property
    def bits(self) -> int:
        """Width of a code."""
        return sum(stage.bits for stage in self.stages)

    @property
    def largest(self) -> float:
        """Largest magnitude of a level."""
        return sum(stage.unit * float(np.abs(stage.points()).max()) for stage in self.stages)

    def nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [...] int64 and points [..., 8] float32 of the nearest points to vectors [..., 8] float32.

        Several stages are taken one after another, each the nearest to what is left.
        """
        left = vectors.reshape(-1, 8)
        code, shift = torch.zeros(len(left), dtype=torch.int64, device=left.device), 0
        for stage in self.stages:
            stage_code = stage.nearest(left / stage.unit)
            left = left - stage.unit * torch.from_numpy(stage.points()).to(left.device)[stage_code]
            code, shift = code | stage_code << shift, shift + stage.bits
        codes = code.view(vectors.shape[:-1])
        return codes, self.points(codes)

    @property
    def is_unique(self) -> bool:
        """True if every code has a point of its own that tells the code."""
        return len(self.stages) == 1

    def codes_of(self, points: Tensor) -> Tensor:
        """Codes [...] int64 of points [..., 8] float32, where points are unique."""
        (stage,) = self.stages
        return _codes_of_e8p(points.reshape(-1, 8) / stage.unit).view(points.shape[:-1])

    def points(self, codes: Tensor) -> Tensor:
        """The points [..., 8] float32 of codes [...] int64."""
        total, shift = torch.zeros(*codes.shape, 8, device=codes.device), 0
        for stage in self.stages:
            points = torch.from_numpy(stage.points()).to(codes.device)
            total += stage.unit * points[(codes >> shift) & ((1 << stage.bits) - 1)]
            shift += stage.bits
        return total


def _e8p(unit: float = 1.0) -> Stage:
    return Stage(16, _e8p_points, nearest_e8p, unit)


LATTICES: dict[str, Lattice] = {
    "e8p": Lattice((_e8p(),), rms=1.03),
    "e8p3": Lattice((_e8p(), Stage(8, _e8_points, nearest_e8, unit=0.5)), rms=1.0),
    "e8p4": Lattice((_e8p(), _e8p(0.26)), rms=0.9),
}
"""Codebooks of eight weights by name; the units and rms were found by search (tests/test_lattice.py holds them)."""
