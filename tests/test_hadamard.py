"""Hadamard matrices: every construction is one, and rotations are their orthonormal products."""

import numpy as np
import pytest
import torch

from ptqc.errors import SpecError
from ptqc.hadamard import factors_of, hadamard, matrix, rotate, rotate_back, rotation_name

ORDERS = [order for order in range(1, 513) if hadamard(order) is not None]
SIZES = [1, 2, 3, 6, 15, 64, 96, 128, 257, 344, 368, 640, 1280]


def test_every_construction_is_orthogonal_in_integers():
    for order in ORDERS:
        signs = hadamard(order).astype(np.float64)  # exact, and faster than integers
        assert np.array_equal(np.abs(signs), np.ones((order, order)))
        assert np.array_equal(signs @ signs.T, order * np.eye(order))


def test_the_orders_that_models_need():
    small = {1, 2, *range(4, 133, 4)} - {40, 56, 88, 96, 112, 120}  # products of smaller ones
    assert small <= set(ORDERS)
    assert hadamard(7) is None and hadamard(40) is None and hadamard(0) is None


@pytest.mark.parametrize(
    ("n", "name"),
    [(1, "had1"), (4096, "had4096"), (1280, "had20x64"), (2880, "had20x12x12"), (368, "had92x4"), (6, "hadr3x2"),
     (14336, "had28x512"), (11008, "had344x32"), (77, "hadr11xr7")],
)  # fmt: skip
def test_names(n, name):
    assert rotation_name(n) == name
    assert np.prod([int(factor.lstrip("r")) for factor in factors_of(n)]) == n


@pytest.mark.parametrize("n", SIZES)
def test_rotating_is_the_dense_product(n, seeded):
    name, x = rotation_name(n), torch.randn(2, 3, n, generator=seeded, dtype=torch.float64)
    dense = matrix(name)
    torch.testing.assert_close(dense @ dense.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(rotate(x, name), x @ dense.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(rotate_back(x, name), x @ dense, atol=1e-12, rtol=0)
    assert n == 15 or dense.abs().max() <= (2 / n) ** 0.5 * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_dtype_computed_in_float32(dtype, seeded):
    x = torch.randn(5, 96, generator=seeded).to(dtype)
    rotated = rotate(x, "had12x8")
    assert rotated.dtype == dtype
    assert torch.equal(rotated, rotate(x.float(), "had12x8").to(dtype))
    bound = 8 * torch.finfo(dtype).eps * float(x.abs().max())
    torch.testing.assert_close(rotate_back(rotated, "had12x8"), x, atol=bound, rtol=0)


def test_no_rows():
    assert rotate(torch.zeros(0, 12), "had12").shape == (0, 12)


@pytest.mark.parametrize(("name", "says"), [("had7", "order 7"), ("had", "had20x64"), ("hadx4", "had20x64")])
def test_names_that_mean_nothing(name, says):
    with pytest.raises(SpecError, match=says):
        rotate(torch.zeros(1, 7), name)


def test_another_number_of_channels():
    with pytest.raises(SpecError, match="rotates 64 channels, not 96; use had"):
        rotate(torch.zeros(1, 96), "had64")
    with pytest.raises(SpecError, match="1 or more"):
        rotation_name(0)
