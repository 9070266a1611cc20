"""Orthogonal matrices that spread every input over all outputs: Hadamard matrices and their Kronecker products.

A Hadamard matrix of order m has entries +-1 and H H^T = m I. Constructions, tried in this order:

    Sylvester     2^k
    Paley I       q + 1 for a prime power q = 3 mod 4              4, 8, 12, 20, 24, 28, 32, 44, 48, 60, ...
    Paley II      2 (q + 1) for a prime power q = 1 mod 4          12, 28, 36, 52, 60, 76, 84, 100, ...
    Williamson    4 n from four symmetric sign sequences of length n found by search        92, 116

A rotation of n is a Kronecker product of such matrices over sqrt(n). What no Hadamard matrix covers, such as an odd
factor, is a Hartley matrix cas(2 pi i j / m) / sqrt(m), cas = cos + sin: orthogonal, symmetric, and no entry exceeds
sqrt(2 / m), so that it spreads almost as well (QuIP# falls back to a Fourier transform likewise; Tseng et al. 2024,
arXiv:2402.04396, section 3.1).

The name of a rotation spells its factors, the leftmost varying slowest, and means the same matrix for ever:

    had64        Sylvester                           had20x64    Paley I of 20, then Sylvester of 64
    had28x12x8   two of Paley and one of Sylvester   hadr257x2   Hartley of 257, then Sylvester of 2
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptqc.errors import SpecError

__all__ = ["factors", "factors_of", "hadamard", "matrix", "rotate", "rotate_back", "rotation_name"]

Signs = npt.NDArray[np.int8]

_LARGEST = 1024
"""Orders above it are looked for among the products of smaller ones only: a factor costs its order per element."""
_SYLVESTER = 64
"""Largest power of two that is multiplied as one dense matrix; larger ones are products of those."""

_WILLIAMSON = {
    23: ("+-+++--++-+-", "+-+--+++++--", "+--++-+-+---", "+++++-++---+"),
    29: ("++-+++--+-++---", "+--+++--++-+---", "++-+-+++-++-+--", "+++-+---++++-++"),
}
"""By n, the first half of the four sequences (they are symmetric), + for 1."""


# -------------------------------------------------------------------- matrices of +1 and -1


def hadamard(order: int) -> Signs | None:
    """The Hadamard matrix of an order, int8 [order, order]; None if no construction here gives it."""
    if order < 1:
        return None
    if order & (order - 1) == 0:
        return _sylvester(order)
    if order % 4:
        return None
    if (field := _prime_power(order - 1)) is not None:
        return _paley_one(*field)
    if (field := _prime_power(order // 2 - 1)) is not None and order % 8 == 4:
        return _paley_two(*field)
    return _williamson(_WILLIAMSON[order // 4]) if order // 4 in _WILLIAMSON else None


def _is_order(order: int) -> bool:
    is_paley_two = order % 8 == 4 and _prime_power(order // 2 - 1) is not None
    return order % 4 == 0 and (_prime_power(order - 1) is not None or is_paley_two or order // 4 in _WILLIAMSON)


def _sylvester(order: int) -> Signs:
    signs = np.ones((1, 1), dtype=np.int8)
    while len(signs) < order:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


def _paley_one(prime: int, exponent: int) -> Signs:
    """I + S for q = 3 mod 4, S skew: the character of differences in GF(q), bordered by ones."""
    signs = _bordered(_character_of_differences(prime, exponent), below=-1)
    np.fill_diagonal(signs, 1)
    return signs


def _paley_two(prime: int, exponent: int) -> Signs:
    """For q = 1 mod 4, S symmetric: its zeros become [[1, -1], [-1, -1]], its signs s become s [[1, 1], [1, -1]]."""
    character = _bordered(_character_of_differences(prime, exponent), below=1)
    signs = np.array([[1, 1], [1, -1]], dtype=np.int8)
    on_diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(character, signs) + np.kron(np.eye(len(character), dtype=np.int8), on_diagonal)


def _bordered(core: Signs, below: int) -> Signs:
    bordered = np.zeros((len(core) + 1, len(core) + 1), dtype=np.int8)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, below, core
    return bordered


def _character_of_differences(prime: int, exponent: int) -> Signs:
    """chi(a - b) over all a, b of GF(q): 0 for 0, 1 for squares, -1 for the rest."""
    digits = np.array(list(product(range(prime), repeat=exponent)))
    character = np.zeros((prime,) * exponent, dtype=np.int8)
    for power, element in enumerate(_powers(prime, exponent)):
        character[element] = -1 if power % 2 else 1  # squares are the even powers of a generator
    differences = (digits[:, None, :] - digits[None, :, :]) % prime
    squares: Signs = character[tuple(np.moveaxis(differences, -1, 0))]
    return squares


def _powers(prime: int, exponent: int) -> list[tuple[int, ...]]:
    """The powers of a generator of GF(q)*, as coefficients of polynomials modulo a primitive one."""
    for tail in product(*(range(prime),) * (exponent - 1), range(1, prime)):  # x has an inverse: its orbit is a cycle
        powers = list(_orbit(prime, tail))
        if len(powers) == prime**exponent - 1:
            return powers
    raise AssertionError(f"GF({prime}^{exponent}) has no generator")


def _orbit(prime: int, tail: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """1, x, x^2, ... until 1 comes back or nothing new can; x^k = tail, or x = tail in a prime field."""
    one = (*(0,) * (len(tail) - 1), 1)
    element = one
    for _ in range(prime ** len(tail) - 1):
        yield element
        lead, shifted = element[0], (*element[1:], 0)
        element = tuple((s + lead * t) % prime for s, t in zip(shifted, tail, strict=True))
        if element == one:
            return


@functools.cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """The prime and the exponent of q, or None."""
    if q < 3:
        return None
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    exponent = round(math.log(q, prime))
    return (prime, exponent) if prime**exponent == q else None


def _williamson(halves: tuple[str, ...]) -> Signs:
    """Four symmetric circulants whose squares add up to 4 n I, in Williamson's array of quaternions."""
    a, b, c, d = (_symmetric_circulant(half) for half in halves)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _symmetric_circulant(half: str) -> Signs:
    signs = [1 if sign == "+" else -1 for sign in half]
    row = np.array(signs + signs[:0:-1], dtype=np.int8)
    return np.stack([np.roll(row, shift) for shift in range(len(row))])


# -------------------------------------------------------------------- names


def rotation_name(n: int) -> str:
    """The name of a rotation of n channels, always the same for the same n.

    >>> rotation_name(1280), rotation_name(11008), rotation_name(514)
    ('had20x64', 'had344x32', 'hadr257x2')

    Raises: SpecError if n is not positive.
    """
    if n < 1:
        raise SpecError(f"a rotation has 1 or more channels, not {n}")
    return "had" + "x".join(factors_of(n))


@functools.cache
def factors_of(n: int) -> tuple[str, ...]:
    """Factors of a rotation of n: Hadamard orders, then one power of two; those of Hartley matrices begin with r.

    Among all ways it takes the one that leaves the least to Hartley matrices, then the cheapest (least sum of orders).
    """
    odd = n // (n & -n)
    twos = (n & -n).bit_length() - 1
    _, _, names, left = min(_covers(odd, twos, odd), key=lambda cover: cover[:2])
    power = (str(2**left),) if left or not names else ()
    return (*names, *power)


def _covers(odd: int, twos: int, limit: int) -> Iterator[tuple[int, int, tuple[str, ...], int]]:
    """(largest Hartley order, sum of orders, names, twos left) of every way to cover the odd part."""
    if odd == 1:
        yield 0, 0, (), twos
        return
    for divisor in (d for d in range(min(odd, limit), 2, -1) if odd % d == 0):
        orders = (divisor << k for k in range(2, twos + 1) if divisor << k <= _LARGEST)
        choices = [(0, order, str(order)) for order in orders if _is_order(order)][:1]
        choices += [] if any(divisor % d == 0 for d in range(3, divisor, 2)) else [(divisor, divisor, f"r{divisor}")]
        for hartley, order, name in choices:
            used = 0 if hartley else (order // divisor).bit_length() - 1
            for worst, cost, names, left in _covers(odd // divisor, twos - used, divisor):
                yield max(hartley, worst), order + cost, (name, *names), left


_NAME = re.compile(r"had(r?\d+(?:xr?\d+)*)")


@functools.lru_cache(maxsize=1024)
def _parse(name: str) -> tuple[npt.NDArray[np.float64], ...]:
    """The orthogonal factors that a name spells, powers of two cut into pieces of at most 64."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise SpecError(f"{name!r} names no rotation; {_GRAMMAR}")
    factors: list[npt.NDArray[np.float64]] = []
    for factor in match[1].split("x"):
        if factor.startswith("r"):
            factors.append(_hartley(int(factor[1:])))
        else:
            factors += [_orthonormal(piece, name) for piece in _pieces(int(factor))]
    return tuple(factors)


_GRAMMAR = "use had<order>[x<order>...], such as had64, had20x64 or hadr257x2; rotation_name(n) finds one for n"


def _pieces(order: int) -> list[int]:
    """Powers of two up to 64 whose product is the order, if it is one itself."""
    pieces: list[int] = []
    while order > _SYLVESTER and order & (order - 1) == 0:
        pieces.append(_SYLVESTER)
        order //= _SYLVESTER
    return [*pieces, order]


def _orthonormal(order: int, name: str) -> npt.NDArray[np.float64]:
    signs = hadamard(order)
    if signs is None:
        raise SpecError(f"{name!r} asks for a Hadamard matrix of order {order}, which none of ours has; {_GRAMMAR}")
    return signs / math.sqrt(order)


def _hartley(order: int) -> npt.NDArray[np.float64]:
    angle = 2 * math.pi / order * (np.outer(np.arange(order), np.arange(order)) % order)
    transform: npt.NDArray[np.float64] = (np.cos(angle) + np.sin(angle)) / math.sqrt(order)
    return transform


# -------------------------------------------------------------------- rotations


def matrix(name: str) -> Tensor:
    """The rotation itself, [n, n] float64, orthogonal."""
    whole = torch.ones(1, 1, dtype=torch.float64)
    for factor in _parse(name):
        whole = torch.kron(whole, torch.tensor(factor))
    return whole


def factors(name: str) -> tuple[npt.NDArray[np.float64], ...]:
    """Orthogonal matrices whose Kronecker product is the rotation, at most 64 or the order of one factor each.

    Raises: SpecError if the name does not parse.
    """
    return _parse(name)


def rotate(x: Tensor, name: str) -> Tensor:
    """Multiply by a rotation along the last axis: x [..., n] -> x H^T, in float32 at least, in the dtype of x.

    Raises: SpecError if the name does not parse, or is a rotation of another number of channels.
    """
    return _apply(x, name, _parse(name))


def rotate_back(x: Tensor, name: str) -> Tensor:
    """Invert `rotate`: x [..., n] -> x H.

    Raises: SpecError if the name does not parse, or is a rotation of another number of channels.
    """
    return _apply(x, name, [factor.T for factor in _parse(name)])


def _apply(x: Tensor, name: str, factors: Sequence[npt.NDArray[np.float64]]) -> Tensor:
    channels = math.prod(len(factor) for factor in factors)
    if x.shape[-1] != channels:
        raise SpecError(f"{name} rotates {channels} channels, not {x.shape[-1]}; use {rotation_name(x.shape[-1])}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    rotated, right = x.to(dtype), channels
    for factor in factors:
        # Made anew every time (a few us): a kept tensor could be the fake one of some tracer.
        left = torch.tensor(factor, dtype=dtype, device=x.device)
        right //= len(factor)
        if right == 1:
            rotated = rotated.reshape(-1, len(factor)) @ left.mT
        else:
            rotated = left @ rotated.reshape(-1, len(factor), right)
    return rotated.reshape(x.shape).to(x.dtype)
