"""Triton kernels for inputs quantized to 8 bits, in the interpreter, against float64 without that quantization."""

import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.codegen.targets.triton_eight_bit import TritonEightBit
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec
from tests.targets.interpreted import needs_triton, run_interpreted

INT8 = [
    "int8", "int8z", "int8g64", "int8g32z", "int8g256z", "int4", "int4z", "int4g64", "int4g32z", "int4g96f", "q4_K",
    "int3g96m", "int2g32", "int6g64", "ternaryg64", "iq4_xs", "mxfp4",
]  # fmt: skip
FP8 = ["fp8e4m3", "fp8e4m3b128x128", "fp8e4m3g64"]
# Against the input as it was quantized: the result is rounded to 11 or 8 bits, sums are int32 and float32.
ROUNDING = {"float16": 1e-3, "bfloat16": 8e-3}
# Against the input before: a step of 1/127 of the largest of some hundreds of normal numbers; e4m3 has 4 bits.
BOUNDS = {"int8-token": 1.2e-2, "int8-tensor-static": 1.2e-2, "int8-tensor": 1.2e-2, "fp8e4m3-token": 3e-2}


def case(spec, act, rows, **more):
    return {"spec": spec, "act": act, "n": 40, "k": 768, "rows": rows, "dtype": "float16", **more}


def check(cases):
    for given, result in zip(cases, run_interpreted(cases), strict=True):
        assert result["target"] == "triton_eight_bit", given
        assert result["rounding"] < ROUNDING[given["dtype"]], (given, result)
        # A gate multiplies two numbers that have the error of the quantized input each: no property of the kernel.
        is_gated = any("gate" in step for step in given.get("epilogue", ()))
        assert is_gated or result["error"] < BOUNDS[given["act"]], (given, result)
        assert result["same"], given


@needs_triton
def test_every_spec_and_chains():
    check([
        *(case(spec, "int8-token", 3) for spec in INT8),
        *(case(spec, "fp8e4m3-token", 3) for spec in FP8),
        *(case("int8", act, 5, prologue=["scale"]) for act in ("int8-tensor-static", "int8-tensor")),
        case("int8z", "int8-token", 17, k=7 * 56, prologue=["rms_norm:1e-6", "order"], epilogue=["bias", "gate_silu"]),
        case("int4g32f", "int8-token", 70, k=7 * 32, epilogue=["gelu", "add"]),
        case("int4g64", "int8-token", 1, dtype="bfloat16"),
        case("fp8e4m3", "fp8e4m3-token", 20, k=328, epilogue=["scale", "mul"]),
    ])  # fmt: skip


@needs_triton
@pytest.mark.sweep
@pytest.mark.parametrize("rows", [1, 16, 64, 257])
def test_all_together(rows):
    check(
        [case(spec, "int8-token", rows, epilogue=epilogue) for spec in INT8 for epilogue in ([], ["bias", "gate_silu"])]
    )


def request(spec, act, **more):
    return KernelRequest(WeightSpec.parse(spec), 64, 256, torch.float16, "cuda", ActSpec.parse(act), **more)


@needs_triton
@pytest.mark.parametrize(
    ("asked", "reason"),
    [(request("int8", "float"), "another target"), (request("nf4g64", "int8-token"), "integer levels"),
     (request("int8", "fp8e4m3-token"), "float8 weights"), (request("int8", "int8-token-outlier6"), "outliers"),
     (request("int4g16", "int8-token"), "group 16"), (request("int8", "int8-token", needs_grad=True), "derivative")],
)  # fmt: skip
def test_refusals(asked, reason):
    assert reason in TritonEightBit().refuses(asked)
