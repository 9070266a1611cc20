"""Which functions let a positive scale through."""

from fractions import Fraction

import pytest
import sympy

from ptqc.passes.groups.homogeneity import POINTWISE, degree, degree_of


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("relu", (), 1),
        ("leaky_relu", (0.2,), 1),
        ("abs", (), 1),
        ("pow", (2,), 2),
        ("pow", (0.5,), Fraction(1, 2)),
        ("rsqrt", (), Fraction(-1, 2)),
        ("clamp", (0.0,), 1),
        ("clamp_min", (0.0,), 1),
        ("threshold", (0.0, 0.0), 1),
        ("sign", (), 0),
    ],
)
def test_homogeneous_functions_have_a_degree(name, numbers, expected):
    assert degree_of(name, numbers) == expected


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("gelu", ()),
        ("silu", ()),
        ("sigmoid", ()),
        ("softplus", ()),
        ("elu", ()),
        ("mish", ()),
        ("hardswish", ()),
        ("relu6", ()),
        ("hardtanh", (0.0, 20.0)),
        ("clamp", (-1.0, 1.0)),
        ("clamp_min", (1e-12,)),
        ("threshold", (1.0, 0.0)),
        ("exp", ()),
        ("round", ()),
    ],
)
def test_other_functions_have_none(name, numbers):
    assert degree_of(name, numbers) is None


def test_the_degree_agrees_with_numbers():
    x, s = 0.7, 1.9
    for name in ("relu", "abs", "square", "sqrt", "rsqrt", "reciprocal", "neg"):
        value = sympy.lambdify(sympy.Symbol("x"), POINTWISE[name](sympy.Symbol("x")), "math")
        assert value(s * x) == pytest.approx(s ** float(degree_of(name)) * value(x))


def test_two_sides_with_different_degrees_are_refused():
    x = sympy.Symbol("x", real=True)
    assert degree(sympy.Piecewise((x, x > 0), (-(x**2), True)), x) is None
