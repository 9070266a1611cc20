"""Fusions: names, operands, and the references of chains."""

import pytest
import torch

from ptqc.fusions import apply_fusions, fusion, narrows, takes_operand
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec


def test_a_chain_runs_in_order():
    y, bias, residual = torch.randn(3, 8), torch.randn(8), torch.randn(3, 4)
    got = apply_fusions(("bias", "gate_silu", "add"), y, [bias, residual])
    gate, up = (y + bias).chunk(2, -1)
    torch.testing.assert_close(got, torch.nn.functional.silu(gate) * up + residual)


def test_a_number_stands_behind_the_colon():
    x, gain = torch.randn(3, 8, dtype=torch.float64), torch.randn(8)
    got = apply_fusions(("rms_norm:1e-3", "order"), x, [gain, torch.arange(7, -1, -1, dtype=torch.int32)])
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * gain
    torch.testing.assert_close(got, normed.flip(-1))


def test_a_request_says_what_its_operands_are():
    request = KernelRequest(
        WeightSpec.parse("int4g32"), 64, 32, torch.float16, "cpu", prologue=("rms_norm:1e-6", "scale"),
        epilogue=("bias", "gate_silu", "mul"),
    )  # fmt: skip
    assert request.operands == ("prologue rms_norm:1e-6", "prologue scale", "epilogue bias", "epilogue mul")
    assert request.width == 32
    assert narrows("gate_silu") and not takes_operand("gate_silu")


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="swish"):
        fusion("swish")
