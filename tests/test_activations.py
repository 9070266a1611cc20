"""Quantized inputs: codes as integer kernels choose them, and the numbers they stand for."""

import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.activations import fake_quantize, outlier_columns, quantize_input
from ptqc.errors import PtqcError

TOKEN, TENSOR = ActSpec(dtype="int8"), ActSpec(dtype="int8", scale="tensor")
STATIC = ActSpec(dtype="int8", scale="tensor", is_static=True)


def test_int8_per_token_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [127.0, 2.5, -3.5]])
    codes, scale = quantize_input(x, TOKEN)
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0], [127, 2, -4]]  # ties to even
    assert torch.equal(scale[[0, 2]], torch.tensor([[2 / 127], [1.0]]))
    assert torch.equal(fake_quantize(x, TOKEN)[1], torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_the_integer_product(dtype, seeded):
    x, weight = torch.randn(7, 64, generator=seeded).to(dtype), torch.randint(-127, 128, (48, 64), generator=seeded)
    codes, scale = quantize_input(x, TOKEN)
    assert codes.dtype == torch.int8
    integers = (codes.int() @ weight.int().T).double() * scale.double()
    numbers = fake_quantize(x.float(), TOKEN).double()
    bound = numbers.abs() @ weight.double().abs().T * 2**-24  # each number is rounded once, to float32
    assert bool(((numbers @ weight.double().T - integers).abs() <= bound).all())
    assert fake_quantize(x, TOKEN).dtype == dtype


@pytest.mark.parametrize("act", [TOKEN, TENSOR, ActSpec(dtype="fp8e4m3"), ActSpec(dtype="fp8e4m3", scale="tensor")])
def test_error_is_at_most_half_a_step(act, seeded):
    x = torch.randn(2, 9, 64, generator=seeded)
    codes, scale = quantize_input(x, act)
    assert scale.shape == ((2, 9, 1) if act.scale == "token" else ())
    relative = 0.0 if act.dtype == "int8" else 2**-4
    assert bool(((fake_quantize(x, act) - x).abs() <= x.abs() * relative + scale * 0.5001).all())
    assert float(codes.float().abs().max()) == (127 if act.dtype == "int8" else 448)


def test_a_static_scale_clips():
    x = torch.tensor([[0.1, 5.0, -5.0]])
    torch.testing.assert_close(fake_quantize(x, STATIC, torch.tensor(0.01)), torch.tensor([[0.1, 1.27, -1.27]]))
    with pytest.raises(PtqcError, match="needs the scale that was calibrated"):
        fake_quantize(x, STATIC)
    with pytest.raises(PtqcError, match="stays in floating point"):
        fake_quantize(x, ActSpec())


def test_outlier_columns_stay_and_the_others_do_not_see_them(seeded):
    x = torch.randn(2, 5, 64, generator=seeded).clamp(-3, 3)
    x[0, 3, 7], x[1, 0, 20] = 60.0, -6.5
    outliers = outlier_columns(x, 6.0)
    assert outliers.nonzero().flatten().tolist() == [7, 20]
    split = ActSpec(dtype="int8", outlier=6.0)
    got = fake_quantize(x, split)
    assert torch.equal(got[..., outliers], x[..., outliers])
    without = x.clone()
    without[..., outliers] = 0
    assert torch.equal(got[..., ~outliers], fake_quantize(without, TOKEN)[..., ~outliers])
    assert (got - x).norm() < 0.2 * (fake_quantize(x, TOKEN) - x).norm()
    assert torch.equal(fake_quantize(x.clamp(-3, 3), split), fake_quantize(x.clamp(-3, 3), TOKEN))


@pytest.mark.parametrize("act", [TOKEN, TENSOR, ActSpec(dtype="int8", outlier=6.0)])
def test_no_tokens_and_not_a_number(act):
    assert fake_quantize(torch.empty(0, 8), act).shape == (0, 8)
    assert torch.isnan(fake_quantize(torch.full((1, 8), torch.nan), act)).all()
