"""GPTQ: the promises, the codes of the paper, and what its options are for."""

import pytest
import torch

from ptqc.errors import SpecError
from ptqc.methods import METHODS, quantize_weight
from ptqc.passes.methods._error_feedback import factor
from ptqc.passes.methods.gptq import Gptq
from ptqc.passes.methods.rtn import RoundToNearest, affine_range
from ptqc.spec import WeightSpec
from ptqc.testing import check_method

SPECS = ["int4g32", "int3g64z", "int2g16", "int4g32f", "int4g32m", "int8", "int8t", "int4z", "int1g32", "nf4g32",
         "nf4g64dq", "fp4g32", "e2m1g16-e4m3", "mxfp4", "fp8e4m3", "ternaryg32", "int8b8x16", "q4_K", "q6_K",
         "iq4_nl"]  # fmt: skip
ORDERS = [False, True, "static"]


def inputs(features, rows=None):
    """Correlated inputs whose channels differ in size, [rows, features]."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(rows or 4 * features, features, generator=generator)
    mixed = mixed @ torch.randn(features, features, generator=generator) / features**0.5
    return mixed * torch.randn(features, generator=generator).mul(0.7).exp()


def hessian_of(x):
    return x.mT @ x / x.shape[-2]


def uncorrelated(features):
    """Statistics under which no error is fed back: it would leave the bounds of single groups."""
    return {"hessian": 2 * torch.eye(features)}


def quantized(weight, hessian, method=None, spec=None, **statistics):
    method = method or Gptq()
    spec = spec or method.spec(3, 32)
    return quantize_weight(weight, method, spec, statistics={"hessian": hessian, **statistics}).dequantize()


def output_error(weight, numbers, hessian):
    error = numbers - weight
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("name", SPECS)
def test_promises(name):
    check_method(Gptq(), WeightSpec.parse(name), statistics=uncorrelated, slack=1.2)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", ["int4g32", "int4g32z"])
def test_promises_of_the_options(act_order, search, name):
    method = Gptq(act_order=act_order, search=search)
    check_method(method, WeightSpec.parse(name), statistics=uncorrelated, slack=1.2, is_exact_on_grid=search)


def test_specs():
    assert Gptq().spec() == WeightSpec.parse("int4g128")
    assert Gptq(symmetric=False).spec(3, 64) == WeightSpec.parse("int3g64z")
    assert Gptq(symmetric=False, zero="float").spec(2, -1) == WeightSpec.parse("int2f")
    assert Gptq(symmetric=False).spec(1.58, 32) == WeightSpec.parse("ternaryg32")
    assert METHODS.get("gptq").needs == {"hessian"}
    assert "single weights" in Gptq().refuses(WeightSpec.parse("e8p"))


@pytest.mark.parametrize("options", [{"act_order": "dynamic"}, {"damp": -0.1}, {"damp": float("inf")}])
def test_options_that_make_no_sense(options):
    with pytest.raises(SpecError, match="gptq"):
        Gptq(**options)


def as_in_the_paper(weight, hessian, spec, damp):
    """Algorithm 1, one column at a time: updates by the Cholesky factor of the inverse; range of each group."""
    weight, columns = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(damped.inverse(), upper=True)
    for column in range(columns):
        if column % spec.group == 0:
            group = weight[:, column : column + spec.group].float()
            scale, zero = (part[:, 0].double() for part in affine_range(group, spec))
        level = (weight[:, column] / scale + zero).round().clamp(0, 2**spec.bits - 1)
        error = (weight[:, column] - (level - zero) * scale) / upper[column, column]
        weight[:, column] = (level - zero) * scale
        weight[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return weight.float()


@pytest.mark.parametrize("group", [16, 32, 96, 192])
def test_the_codes_of_the_paper(group, seeded):
    hessian = hessian_of(inputs(192))
    weight = torch.randn(16, 192, generator=seeded)
    spec = WeightSpec.parse(f"int3g{group}z")
    numbers = quantized(weight, hessian, Gptq(symmetric=False, act_order=False, search=False), spec)
    expected = as_in_the_paper(weight, hessian, spec, 0.01)
    same = (numbers - expected).abs() < 1e-3  # a weight halfway between two levels may go either way
    assert same.all(dim=1).float().mean() > 0.8


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("name", ["int4g32", "int3g32z", "int3g32f", "int2g32m", "nf4g32", "q4_K", "int8b8x16", "int3"])
def test_smaller_output_error_and_larger_weight_error_than_rounding(act_order, name, seeded):
    spec = WeightSpec.parse(name)
    hessian = hessian_of(inputs(256))
    weight = torch.randn(32, 256, generator=seeded)
    ours = quantized(weight, hessian, Gptq(act_order=act_order), spec)
    rounded = quantize_weight(weight, RoundToNearest(), spec).dequantize()
    assert output_error(weight, ours, hessian) < 0.7 * output_error(weight, rounded, hessian)
    assert (ours - weight).norm() > (rounded - weight).norm()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_order_and_search_are_for(symmetric, bits, seeded):
    hessian = hessian_of(inputs(256))
    weight = torch.randn(64, 256, generator=seeded)
    spec = Gptq(symmetric).spec(bits, 64)
    paper, ordered, searched = (
        output_error(weight, quantized(weight, hessian, method, spec), hessian)
        for method in (
            Gptq(symmetric, act_order=False, search=False),
            Gptq(symmetric, search=False),
            Gptq(symmetric),
        )
    )
    assert searched < ordered < paper


def test_order_comes_back_with_the_codes(seeded):
    hessian = hessian_of(inputs(64))
    weight = torch.randn(8, 64, generator=seeded)
    logical = Gptq(act_order=True).choose(weight, WeightSpec.parse("int8g16"), {"hessian": hessian})
    assert torch.equal(logical.order.sort().values, torch.arange(64))
    assert (hessian.diagonal()[logical.order].diff() <= 0).all()
    numbers = quantized(weight, hessian, Gptq(act_order=True), WeightSpec.parse("int8g16"))
    assert (numbers - weight).abs().max() < 0.1
    for act_order, spec in ((False, "int8g16"), ("static", "int8g16"), (True, "int8")):
        method = Gptq(act_order=act_order)
        assert method.choose(weight, WeightSpec.parse(spec), {"hessian": hessian}).order is None


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_too_few_rows(rows, seeded):
    x = inputs(64, 64)[:rows]
    hessian = hessian_of(x) if rows else torch.zeros(64, 64)
    weight = torch.randn(8, 64, generator=seeded)
    numbers = quantized(weight, hessian, count=torch.tensor(float(rows)))
    assert ((numbers - weight).norm() / weight.norm()) < 0.4
    if rows:
        rounded = quantize_weight(weight, RoundToNearest(), Gptq().spec(3, 32)).dequantize()
        assert (x @ (numbers - weight).t()).norm() < (x @ (rounded - weight).t()).norm()


def test_a_hessian_that_is_not_positive_definite(seeded):
    x = inputs(64)
    hessian = hessian_of(x) - 0.3 * x.square().mean() * torch.eye(64)
    weight = torch.randn(8, 64, generator=seeded)
    assert torch.linalg.cholesky_ex(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)).info > 0
    assert ((quantized(weight, hessian) - weight).norm() / weight.norm()) < 1


def test_the_factor(seeded):
    hessian = torch.stack([hessian_of(inputs(24)), torch.eye(24), torch.zeros(24, 24)])
    hessian[0, 5] = hessian[0, :, 5] = 0
    upper = factor(hessian, torch.tensor([0.0, 0.5, 0.0]))
    assert torch.equal(upper, upper.triu())
    product = upper @ upper.mT
    live = torch.arange(24) != 5
    torch.testing.assert_close(product[0][live][:, live], hessian[0][live][:, live], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(product[1], 1.5 * torch.eye(24))
    torch.testing.assert_close(product[2], torch.eye(24))
    assert (product[0][5, live] == 0).all() and product[0][5, 5] > 0


@pytest.mark.parametrize("act_order", ORDERS)
def test_columns_that_were_always_zero_are_rounded_to_nearest(act_order, seeded):
    x = inputs(64)
    x[:, ::7] = 0
    weight = torch.randn(8, 64, generator=seeded)
    numbers = quantized(weight, hessian_of(x), Gptq(act_order=act_order), WeightSpec.parse("int8g16"))
    assert (numbers - weight)[:, ::7].abs().max() < 0.02


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("name", ["int3g16", "int4g16z", "int4"])
def test_a_stack_is_its_matrices(act_order, name, seeded):
    method, spec = Gptq(act_order=act_order), WeightSpec.parse(name)
    weight = torch.randn(2, 3, 8, 64, generator=seeded)
    hessian = torch.stack([hessian_of(part) for part in inputs(64, 6 * 100).view(6, 100, 64)]).view(2, 3, 64, 64)
    count = torch.tensor([[100.0, 5, 0], [100, 100, 100]])
    together = quantized(weight, hessian, method, spec, count=count)
    for index in ((0, 0), (0, 1), (0, 2), (1, 2)):
        alone = quantized(weight[index], hessian[index], method, spec, count=count[index])
        torch.testing.assert_close(together[index], alone)


def test_the_number_of_threads_changes_nothing(seeded):
    weight, hessian = torch.randn(300, 256, generator=seeded), hessian_of(inputs(256))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = quantized(weight, hessian)
        torch.set_num_threads(2)
        together = quantized(weight, hessian)
    finally:
        torch.set_num_threads(threads)
    assert (alone != together).float().mean() < 0.02  # matrix products may be summed in another order


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_left_of_an_error_is_the_variance_behind_later_columns(order):
    hessian = hessian_of(inputs(24))
    found = Gptq(act_order=order, damp=0.0).column_importance({"hessian": hessian})
    columns = hessian.diagonal().argsort(descending=True) if order else torch.arange(24)
    for place, column in enumerate(columns.tolist()):
        later = columns[place + 1 :]
        cross, rest = hessian[column, later].double(), hessian[later][:, later].double()
        left = hessian[column, column].double() - cross @ torch.linalg.solve(rest, cross)
        assert float(found[column]) == pytest.approx(float(left), rel=1e-3)
