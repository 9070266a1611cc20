"""Weight-only Triton kernels in the interpreter, against float64 of the dequantized weights; refusals; the tables."""

import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.codegen.targets.triton_linear import TritonLinear
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec
from tests.targets.interpreted import needs_triton, run_interpreted

# Levels, scales and the result are rounded to 11 or 8 bits, sums are float32; the interpreter rounds bfloat16 to zero.
BOUNDS = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6}
SPECS = {
    "int4g32": 32, "int4g64": 64, "int4g128": 128, "int4": 128, "int4g32z": 32, "int4g32f": 32, "int4g32m": 32,
    "int4z": 64, "int4m": 64, "int4g96": 96, "int4g48": 48, "int4t": 64, "int8": 32, "int8g64": 64, "int8g32z": 32,
    "int7g64": 64, "int6g32": 32, "int5g64z": 64, "int3g64": 64, "int3g32m": 32, "int2g32f": 32, "int1g128": 128,
    "ternaryg64": 64, "nf4g64": 64, "nf4g64dq": 64, "fp4g64": 64, "iq4_xs": 256, "mxfp4": 32, "nvfp4": 16, "q2_K": 256,
    "q3_K": 256, "q4_K": 256, "q5_K": 256, "q6_K": 256, "fp8e4m3": 16, "fp8e5m2": 16, "fp8e4m3b128x128": 128,
    "fp8e4m3b32x48": 40, "e8p": 8, "e8pg128": 128, "e8p3": 8, "e8p4": 8,
}  # fmt: skip
"""By spec: what in_features is an odd multiple of."""
EPILOGUES = [
    (), ("bias",), ("scale", "bias", "silu"), ("bias", "gate_silu"), ("gate_gelu_tanh", "mul", "add"), ("gelu", "add"),
    ("gelu_tanh",), ("mul", "relu"), ("relu2",), ("sigmoid",), ("tanh", "scale"), ("add", "gate_gelu", "bias"),
    ("gate_relu",), ("gate_relu2",), ("gate_sigmoid",), ("gate_tanh",),
]  # fmt: skip
PROLOGUES = [("order",), ("scale",), ("rms_norm:1e-6",), ("rms_norm:1e-5", "order", "scale"), ("scale", "order")]
ROWS = (1, 3, 16, 64, 257)


def case(spec, rows, dtype="float16", **more):
    odd = 3 if SPECS[spec] >= 64 else 7
    return {"spec": spec, "n": 40, "k": odd * SPECS[spec], "rows": rows, "dtype": dtype, **more}


def check(cases):
    for given, result in zip(cases, run_interpreted(cases), strict=True):
        assert result["target"] == "triton_linear", given
        assert result["error"] < BOUNDS[given["dtype"]], (given, result)
        assert result["same"], given


@needs_triton
def test_every_spec_type_and_number_of_rows():
    others = ("int4g64", "int8g32z", "int4g32f", "int3g32m", "nf4g64", "e8p3", "fp8e4m3")
    check([
        *(case(spec, 3) for spec in SPECS),
        *(case(spec, 1, dtype) for spec in others for dtype in ("bfloat16", "float32")),
        *(case("int4g32z", rows) for rows in ROWS), case("nf4g64", 257),
    ])  # fmt: skip


@needs_triton
def test_tiles_of_older_gpus():
    """Steps that take their inputs in pieces, whole blocks and the end of a row."""
    check([case(spec, 64, capability=80) for spec in ("int4g128", "int4g96", "int4", "int2g32f", "int3g64")])


@needs_triton
def test_chains():
    check([
        *(case("int4g32", 5, epilogue=epilogue) for epilogue in EPILOGUES),
        *(case("int4g32", 257, epilogue=epilogue) for epilogue in EPILOGUES[2:5]),
        *(case("int4g64", 2, prologue=prologue, epilogue=("bias",)) for prologue in PROLOGUES),
        case("int4g64", 257, prologue=PROLOGUES[3]),
    ])  # fmt: skip


@needs_triton
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("rows", ROWS)
def test_all_together(rows, dtype):
    """Every spec with every epilogue and some prologue."""
    check([
        case(spec, rows, dtype, epilogue=epilogue, prologue=PROLOGUES[i % len(PROLOGUES)] if i % 3 == 0 else ())
        for spec in SPECS for i, epilogue in enumerate(EPILOGUES)
    ])  # fmt: skip


def request(spec="int4g64", device="cuda", dtype=torch.float16, k=256, **more):
    return KernelRequest(WeightSpec.parse(spec), 64, k, dtype, device, **more)


@needs_triton
@pytest.mark.parametrize(
    ("asked", "reason"),
    [(request(device="cpu"), "run on GPUs"), (request(needs_grad=True), "derivative"),
     (request(act=ActSpec.parse("int8-token")), "another target"), (request(dtype=torch.float64), "float64"),
     (request("int4g24", k=240), "group 24"), (request("e8pg64"), "group 64"),
     (request(prologue=("scale",), k=1 << 17), "at most 65536"), (request("nf4g64z"), "nothing is subtracted"),
     (request("ternaryg64f"), "nothing is subtracted")],
)  # fmt: skip
def test_refusals(asked, reason):
    assert reason in TritonLinear().refuses(asked)


@needs_triton
def test_nothing_else_is_refused():
    emitter = TritonLinear()
    for spec, step in SPECS.items():
        assert emitter.refuses(request(spec, k=3 * step)) is None


def test_emitting_is_pure():
    asked = request("nf4g64", epilogue=("bias", "gate_silu"))
    assert TritonLinear().emit(asked) == TritonLinear().emit(asked)


def test_kernels_of_other_shapes_have_the_same_text():
    first, second = (TritonLinear().emit(request(k=k)).text.split("LINEAR =")[0] for k in (256, 512))
    assert first == second  # Triton compiles them once
