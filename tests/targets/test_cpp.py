"""The C++ target against float64 products with the dequantized weights."""

import itertools

import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.activations import fake_quantize
from ptqc.codegen.build import load_text, target_for
from ptqc.codegen.cpp.isa import ISAS, cpu_flags, running_isa
from ptqc.codegen.cpp.toolchain import compiler, missing_tools
from ptqc.codegen.targets.cpp import Cpp
from ptqc.fusions import ACTIVATIONS
from ptqc.requests import KernelRequest
from ptqc.spec import KNOWN_SPECS, WeightSpec
from tests.cpp._emulated import emulated
from tests.cpp._run import EXACT, QUANTIZED, case, error

pytestmark = pytest.mark.skipif(
    isinstance(running_isa(), str) or missing_tools(compiler(), running_isa()) is not None, reason="no C++ compiler"
)

TOKEN, STATIC = ActSpec.parse("int8-token"), ActSpec.parse("int8-tensor-static")
ROWS = (1, 3, 16, 64, 257)
SPECS = ("int4g32", "int8", "int4g24z", "int2g16f", "q4_K", "q6_K", "nf4g64dq", "iq4_xs", "fp8e4m3b128x128", "e8p")
EVERY_SPEC = (
    *(f"int{bits}g{rest}" for bits in range(1, 9) for rest in ("8z", "24f", "32", "200m")),
    "int8", "int8z", "int4t", "ternary", "ternaryg64", "nf4g64", "nf4g64dq", "fp4g64", "fp8e4m3", "fp8e5m2g64", "e8p",
    "fp8e4m3b128x128", "e8p3", "e8p4g64", *KNOWN_SPECS,
)  # fmt: skip
EPILOGUES = (
    ("bias", "gelu"), ("scale", "add"), ("silu", "mul"), ("bias", "gate_silu", "add"), ("gelu_tanh", "relu2", "tanh"),
)  # fmt: skip


def shape(name, n=97):
    """Odd shapes that the groups divide: an odd number of groups, outputs that fill no vector."""
    spec = WeightSpec.parse(name)
    if spec.is_block:
        return n, 200
    unit = 256 if spec.scale.block and not spec.scale.dynamic else spec.group or 104
    return n, unit * max(1, 520 // unit | 1)


def check(made, bar):
    got = made.run()
    assert error(got, made.expected()) < bar
    assert torch.equal(got, made.run())
    return got


@pytest.mark.parametrize("name", SPECS)
def test_specs_with_int8_activations(name):
    check(case(name, *shape(name)), QUANTIZED)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int4g32", torch.float16), ("int3g24m", torch.bfloat16), ("nf4g64", torch.float32), ("int8z", torch.float16)],
)
def test_exact_requests_are_not_quantized(name, dtype):
    check(case(name, *shape(name), dtype=dtype, exact=True), EXACT[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_do_not_depend_on_their_number(dtype):
    one = case("int4g32", 100, 160, 257, dtype)
    whole, x = check(one, QUANTIZED), one.x
    for rows in (0, 1, 3, 16, 64):
        one.x = x[:rows]
        assert torch.equal(one.run(), whole[:rows])


def test_a_view_and_more_threads_change_nothing():
    made = case("int4g32", 4096, 512, rows=9)
    alone = made.run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        made.x = torch.cat([made.x, made.x], 1)[:, :512]
        assert not made.x.is_contiguous()
        assert torch.equal(made.run(), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda names: "-".join(names))
def test_epilogues(epilogue):
    check(case("int4g32", 2 * 37, 160, epilogue=epilogue, exact=True), 2e-5)


def test_epilogues_behind_integers():
    check(case("int4g32", 2 * 37, 160, 5, torch.bfloat16, epilogue=("bias", "gate_gelu", "add")), QUANTIZED)


@pytest.mark.parametrize("prologue", [("rms_norm:1e-05",), ("order", "scale")], ids=lambda names: "-".join(names))
def test_prologues(prologue):
    check(case("int4g24", 60, 24 * 7, prologue=prologue, exact=True), 2e-5)


def test_prologues_before_integers():
    check(case("int4g24z", 60, 24 * 7, 5, torch.bfloat16, prologue=("rms_norm:1e-05",)), QUANTIZED)


@pytest.mark.parametrize("act", [TOKEN, STATIC], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4g24z"])
def test_quantized_inputs_are_those_of_the_reference(act, name):
    made = case(name, *shape(name), act=act, epilogue=("bias",))
    numbers = fake_quantize(made.x, act, made.operands[0] if act.is_static else None)
    assert error(check(made, 3e-2), made.expected(numbers)) < 5e-4  # scales of groups are rounded to float16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("act", [ActSpec(), TOKEN, STATIC], ids=str)
def test_what_is_not_finite_spoils_its_row_and_no_other(value, act):
    made = case("int8", *shape("int8"), act=act, epilogue=("bias",) if act.dtype else ())
    clean = made.run()
    made.x[1, 40] = value
    got = made.run()
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_zero_rows_and_extreme_scales():
    made = case("int4g32", 48, 96)
    made.x[0] = 0
    made.x[1] *= 1e30
    made.parts[1][7] = 0
    made.parts[1][8] = 6e-8  # the smallest float16
    got = made.run()
    assert (got[0] == 0).all() and (got[:, 7] == 0).all()
    assert got.isfinite().all() and (got[2, 8] != 0)


@pytest.mark.parametrize("isa", [name for name, isa in ISAS.items() if isa.needs <= cpu_flags()])
@pytest.mark.parametrize("name", ["nf4g64", pytest.param("int2g16f", marks=pytest.mark.slow)])
def test_instructions_can_be_forced(isa, name, monkeypatch):
    monkeypatch.setenv("PTQC_CPU_ISA", isa)
    assert f" in C++ for {isa}" in Cpp().emit(case(name, *shape(name)).request).text
    check(case(name, *shape(name), rows=7, dtype=torch.float16), QUANTIZED)


@pytest.mark.skipif("avx2" not in cpu_flags(), reason="the emulation of wider instructions wants AVX2")
@pytest.mark.parametrize(
    ("isa", "name"), [("avx512vnni", "int4g32z"), ("avx512vnni", "nf4g64"), ("avxvnni", "int8")]
)
def test_instructions_that_this_cpu_lacks(isa, name, monkeypatch):
    """Tiles, layout and levels for them, with the instructions themselves in plain C++."""
    monkeypatch.setattr("ptqc.codegen.targets.cpp.running_isa", lambda: emulated(isa))
    check(case(name, *shape(name), rows=7, dtype=torch.float16, epilogue=("bias",)), QUANTIZED)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [({"device": "cuda"}, "CPU inference"), ({"needs_grad": True}, "CPU inference"),
     ({"dtype": torch.float64}, "float64"), ({"act": ActSpec.parse("fp8e4m3-token")}, "fp8e4m3-token"),
     ({"act": ActSpec.parse("int8-token-outlier6")}, "outlier"),
     ({"act": ActSpec.parse("int8-tensor")}, "calibrated"), ({"epilogue": ("gate_silu", "gate_silu")}, "one gate"),
     ({"spec": WeightSpec.parse("e8p4"), "exact": True}, "no exact form"),
     ({"spec": WeightSpec.parse("fp8e4m3"), "act": TOKEN}, "no integer form")],
)  # fmt: skip
def test_refusals_say_why(changed, reason):
    plain = {"spec": WeightSpec.parse("int4g32"), "n": 64, "k": 64, "dtype": torch.float32, "device": "cpu"}
    assert Cpp().refuses(KernelRequest(**plain)) is None
    assert reason in Cpp().refuses(KernelRequest(**(plain | changed)))


@pytest.mark.parametrize(("isa", "reason"), [("sse9", "use one of avx512vnni"), ("neon", "lacks")])
def test_wrong_instructions_are_refused(isa, reason, monkeypatch):
    if isa == running_isa().name:
        pytest.skip("this CPU has them")
    monkeypatch.setenv("PTQC_CPU_ISA", isa)
    assert reason in Cpp().refuses(case("int4g32", 64, 64).request)


def test_it_comes_before_the_others():
    assert target_for(KernelRequest(WeightSpec.parse("int4g64"), 64, 256, torch.bfloat16, "cpu")) == "cpp"


def test_weights_of_one_spec_share_a_library():
    texts = [Cpp().emit(case("int4g32", n, k).request).text for n, k in ((64, 64), (48, 256))]
    first, second = (load_text(text).SOURCE for text in texts)
    assert texts[0] != texts[1] and first == second


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize("name", EVERY_SPEC)
def test_every_spec(name, dtype):
    for rows, exact in itertools.product(ROWS, (False, True)):
        made = case(name, *shape(name, n=2 * 51), rows, dtype, exact=exact)
        if Cpp().refuses(made.request) is None:
            # Behind zeros all outputs of one row share the error of the inputs' sum, which is near 0 for some rows.
            check(made, EXACT[dtype] if exact else QUANTIZED * (1.5 if rows == 1 else 1))


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", list(EXACT), ids=str)
@pytest.mark.parametrize("name", [*ACTIVATIONS, *(f"gate_{name}" for name in ACTIVATIONS)])
@pytest.mark.parametrize("spec", ["int4g32", "int8z"])
def test_every_epilogue(spec, name, dtype):
    k, chain = 520 if spec == "int8z" else 544, ("bias", name, "mul")
    for rows in ROWS:
        check(case(spec, 2 * 51, k, rows, dtype, epilogue=chain, exact=True), EXACT[dtype])
        # A gate multiplies two numbers that have the error of the quantized input each: no property of the kernel.
        check(case(spec, 2 * 51, k, rows, dtype, epilogue=chain), 5e-2)
