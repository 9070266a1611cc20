"""ATen's int4 and int8 products through the emitter interface: values, refusals, the cache of texts."""

import pytest
import torch

from ptqc.codegen import build
from ptqc.codegen.build import kernel_for, load_text
from ptqc.methods import METHODS, quantize_weight
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    """The targets that come before ATen's refuse."""

    def forget():
        for cached in (build.kernel_for, build._first):
            cached.cache_clear()

    monkeypatch.setenv("CXX", "no-such-compiler")
    forget()
    yield
    forget()


def run(name, shape, dtype, rows=3, needs_grad=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    stored = quantize_weight(weight, METHODS.get("rtn")(), WeightSpec.parse(name))
    request = KernelRequest(stored.spec, *shape, dtype, "cpu", needs_grad=needs_grad, epilogue=("bias",))
    kernel = kernel_for(request)
    x = torch.randn(2, rows, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    got = kernel(x, list(stored.parts.values()), [bias])
    exact = x.double() @ stored.dequantize().double().T + bias.double()
    return kernel, float((got.double() - exact).norm() / exact.norm()), got


@pytest.mark.parametrize("name", ["int4g32", "int4g64z", "int4g128f", "int4g32m"])
def test_int4(name):
    kernel, error, got = run(name, (64, 256), torch.bfloat16)
    assert kernel.target == "aten_int4"
    assert got.shape == (2, 3, 64)
    assert error < 1.2e-2  # bfloat16 activations, weights, scales and result: 2**-8 each


def test_int8():
    kernel, error, _ = run("int8", (64, 256), torch.bfloat16)
    assert kernel.target == "aten_int8"
    assert error < 8e-3


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "needs_grad"),
    [("int4g64", (64, 256), torch.float32, False), ("int3g64", (64, 256), torch.bfloat16, False),
     ("int4g48", (64, 240), torch.bfloat16, False), ("int4g64", (60, 256), torch.bfloat16, False),
     ("nf4g64", (64, 256), torch.bfloat16, False), ("int4g64", (64, 256), torch.bfloat16, True)],
)  # fmt: skip
def test_what_they_refuse_goes_to_the_reference_with_reasons(name, shape, dtype, needs_grad):
    kernel, error, _ = run(name, shape, dtype, needs_grad=needs_grad)
    assert kernel.target == "reference"
    assert {target for target, _ in kernel.refusals} >= {"aten_int4", "aten_int8", "cpp"}
    assert all(reason for _, reason in kernel.refusals)
    assert error < 8e-3


def test_texts_are_cached_by_their_hash(tmp_path, monkeypatch):
    monkeypatch.setenv("PTQC_CACHE", str(tmp_path))
    assert load_text("VALUE = 3\n").VALUE == 3
    (file,) = tmp_path.glob("k_*.py")
    file.write_text("VALUE = 4\n")  # a damaged cache is written again
    assert load_text("VALUE = 3\n").VALUE == 3
    assert not list(tmp_path.glob("*.tmp"))
