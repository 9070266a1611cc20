"""Homogeneity: whether a pointwise function lets a positive scale through, decided by sympy.

f lets a scale pass iff there is a k with f(s x) = s**k f(x) for all real x and all s > 0. By Euler's theorem that is
s f'(s x) x = k f(s x), a constant k, on each side of zero. ReLU: 1; squared ReLU: 2; SiLU, GELU, tanh: no k.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from sympy import Max, Min, Piecewise, Rational

__all__ = ["POINTWISE", "degree", "degree_of"]

_X = sympy.Symbol("x", real=True)
_P = sympy.Symbol("p", positive=True)
_S = sympy.Symbol("s", positive=True)


def _elu(x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    return scale * Piecewise((x, x > 0), (alpha * (sympy.exp(x * input_scale) - 1), True))


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    bounded = x if low is None else Max(x, low)
    return bounded if high is None else Min(bounded, high)


def _gelu(x: Any) -> Any:
    return x * (1 + sympy.erf(x / sympy.sqrt(2))) / 2


POINTWISE: dict[str, Callable[..., Any]] = {
    "abs": lambda x: sympy.Abs(x),
    "acos": sympy.acos,
    "asin": sympy.asin,
    "atan": sympy.atan,
    "ceil": sympy.ceiling,
    "celu": lambda x, alpha=1: _elu(x, alpha, 1, 1 / sympy.sympify(alpha)),
    "clamp": _clamp,
    "clamp_max": lambda x, high: Min(x, high),
    "clamp_min": lambda x, low: Max(x, low),
    "cos": sympy.cos,
    "cosh": sympy.cosh,
    "elu": _elu,
    "erf": sympy.erf,
    "exp": sympy.exp,
    "exp2": lambda x: 2**x,
    "expm1": lambda x: sympy.exp(x) - 1,
    "floor": sympy.floor,
    "gelu": _gelu,
    "hardshrink": lambda x, bound=Rational(1, 2): Piecewise((x, x > bound), (x, x < -bound), (0, True)),
    "hardsigmoid": lambda x: Min(Max(x + 3, 0), 6) / 6,
    "hardswish": lambda x: x * Min(Max(x + 3, 0), 6) / 6,
    "hardtanh": lambda x, low=-1, high=1: Min(Max(x, low), high),
    "leaky_relu": lambda x, slope=Rational(1, 100): Piecewise((x, x > 0), (slope * x, True)),
    "log": sympy.log,
    "log1p": lambda x: sympy.log(1 + x),
    "log_sigmoid_forward": lambda x: -sympy.log(1 + sympy.exp(-x)),
    "mish": lambda x: x * sympy.tanh(sympy.log(1 + sympy.exp(x))),
    "neg": lambda x: -x,
    "pow": lambda x, power: x**power,
    "reciprocal": lambda x: 1 / x,
    "relu": lambda x: Max(x, 0),
    "relu6": lambda x: Min(Max(x, 0), 6),
    "round": lambda x: sympy.floor(x + Rational(1, 2)),
    "rsqrt": lambda x: 1 / sympy.sqrt(x),
    "selu": lambda x: _elu(x, Rational(16733, 10000), Rational(10507, 10000)),
    "sgn": sympy.sign,
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "sign": sympy.sign,
    "silu": lambda x: x / (1 + sympy.exp(-x)),
    "sin": sympy.sin,
    "softplus": lambda x, beta=1, threshold=20: sympy.log(1 + sympy.exp(beta * x)) / beta,
    "softshrink": lambda x, bound=Rational(1, 2): Piecewise((x - bound, x > bound), (x + bound, x < -bound), (0, True)),
    "sqrt": sympy.sqrt,
    "square": lambda x: x**2,
    "tan": sympy.tan,
    "tanh": sympy.tanh,
    "threshold": lambda x, bound, value: Piecewise((x, x > bound), (value, True)),
}
"""ATen operator -> its value as an expression in x and the operator's numbers."""


@lru_cache(maxsize=1024)
def degree_of(name: str, numbers: tuple[float | None, ...] = ()) -> Fraction | None:
    """The degree of an ATen operator with these numbers behind its tensor, None if it is not homogeneous.

    Raises KeyError for an operator that is not in `POINTWISE`.
    """
    exact = [None if number is None else sympy.nsimplify(number, rational=True) for number in numbers]
    return degree(POINTWISE[name](_X, *exact), _X)


def degree(expression: Any, x: Any) -> Fraction | None:
    """k if expression(s x) = s**k expression(x) for all real x and s > 0, else None. Zero itself counts as 1."""
    found: set[Fraction] = set()
    for sign in (1, -1):
        side = sympy.piecewise_fold(sympy.sympify(expression).subs(x, sign * _S * _P))
        side = sympy.simplify(side.rewrite(Piecewise)) if side.has(Max, Min, sympy.sign) else side
        if side == 0:
            continue
        power = _power(side)
        if power is None:
            return None
        found.add(power)
    if len(found) > 1:
        return None
    return found.pop() if found else Fraction(1)


def _power(side: Any) -> Fraction | None:
    """k if `side` is s**k times what does not depend on s."""
    ratio = sympy.simplify(_S * sympy.diff(side, _S) / side)
    if not ratio.is_number:
        return None
    if not ratio.is_rational or side.has(Piecewise, sympy.floor, sympy.ceiling):
        return None
    return Fraction(int(ratio.p), int(ratio.q))
