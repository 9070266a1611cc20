"""The ptqc:: operators: values, fakes, derivatives."""

import pytest
import torch

from ptqc import ops
from ptqc.methods import METHODS, quantize_weight
from ptqc.spec import WeightSpec


def stored(shape, name, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return quantize_weight(weight, METHODS.get("rtn")(), WeightSpec.parse(name))


@pytest.mark.parametrize("name", ["int4g64", "int3g32z", "nf4g64dq", "q4_K", "fp8e4m3b128x128", "ternaryg64"])
def test_linear_against_float64(name, seeded):
    weight, x, bias = stored((48, 256), name), torch.randn(5, 256, generator=seeded), torch.randn(48, generator=seeded)
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    got = ops.linear(x, list(weight.parts.values()), name, bias)
    assert (got.double() - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_type_of_the_activation(dtype):
    weight = stored((48, 256), "int4g64")
    x = torch.ones(2, 3, 256, dtype=dtype)
    assert ops.linear(x, list(weight.parts.values()), "int4g64", None).dtype == dtype


def test_opcheck(seeded):
    weight, stack = stored((48, 256), "int4g64z"), stored((3, 48, 256), "int4g64z")
    parts, stacked = list(weight.parts.values()), list(stack.parts.values())
    x = torch.randn(5, 256, generator=seeded, requires_grad=True)
    torch.library.opcheck(ops.linear, (x, parts, "int4g64z", None))
    torch.library.opcheck(ops.linear, (x, parts, "int4g64z", torch.randn(48, requires_grad=True)))
    torch.library.opcheck(ops.bmm, (torch.randn(3, 5, 256, requires_grad=True), stacked, "int4g64z"))
    torch.library.opcheck(ops.embedding, (torch.tensor([[1, 2], [0, 47]]), parts, "int4g64z", [48, 256], torch.float32))
    torch.library.opcheck(ops.dequantize, (parts, "int4g64z", [48, 256], torch.float16))


def test_derivative_towards_the_activation_and_the_bias():
    weight = stored((6, 32), "int8g32-f32")
    parts = list(weight.parts.values())
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: ops.linear(x, parts, "int8g32-f32", b), (x, bias))
    stack = stored((2, 6, 32), "int8g32-f32")
    y = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: ops.bmm(y, list(stack.parts.values()), "int8g32-f32"), (y,))


@pytest.mark.parametrize("name", ["int4g64", "nf4g64dq", "fp8e4m3t"])
def test_embedding_reads_rows(name):
    weight, ids = stored((50, 128), name), torch.tensor([[3, 49], [0, 3]])
    got = ops.embedding(ids, list(weight.parts.values()), name, [50, 128], torch.float32)
    assert torch.equal(got, weight.dequantize()[ids])


def test_opcheck_of_what_stands_around(seeded):
    x = torch.randn(3, 5, 96, generator=seeded, requires_grad=True)
    torch.library.opcheck(ops.hadamard, (x, "had12x8"))
    torch.library.opcheck(ops.hadamard_back, (x.detach().mT.contiguous().mT.requires_grad_(), "had12x8"))
    torch.library.opcheck(ops.fake_quantize, (x, "int8-token-outlier2", None))
    torch.library.opcheck(ops.fake_quantize, (x, "fp8e4m3-tensor-static", torch.tensor(0.1)))
    torch.library.opcheck(ops.fake_quantize, (x, "float", None))


def test_rotations_invert_each_other_and_are_their_derivatives(seeded):
    x = torch.randn(2, 12, generator=seeded, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ops.hadamard_back(ops.hadamard(x, "had12"), "had12"), x)
    assert torch.autograd.gradcheck(lambda x: ops.hadamard(x, "had12"), (x,))
    assert torch.autograd.gradcheck(lambda x: ops.hadamard_back(x, "had12"), (x,))
    assert ops.hadamard(x.new_empty(0, 12), "had12").shape == (0, 12)


def test_quantization_of_inputs_is_straight_through(seeded):
    x, grad = torch.randn(4, 8, generator=seeded, requires_grad=True), torch.randn(4, 8, generator=seeded)
    ops.fake_quantize(x, "int8-token", None).backward(grad)
    assert torch.equal(x.grad, grad)
