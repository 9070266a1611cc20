"""Runs in a process of its own, with TRITON_INTERPRET=1: kernels of the Triton targets against float64, for the tests.

Reads a JSON list of cases from stdin and writes one result for each. Triton reads the variable when it is imported, and
other tests of the same process want it compiled.
"""

import json
import sys
from dataclasses import replace

import torch

from ptqc import storage
from ptqc.act_spec import ActSpec
from ptqc.activations import quantize_input, static_scale
from ptqc.codegen.build import kernel_for
from ptqc.codegen.gpu import tiles
from ptqc.fusions import apply_fusions, fusion, narrows
from ptqc.methods import METHODS, quantize_weight
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec


def stored_parts(spec, n, k, generator):
    """Parts of a weight whose groups are not centred, and the numbers they stand for in float64."""
    if spec.vector > 1:
        codes = torch.randint(0, 1 << spec.bits, (n, k // spec.vector), generator=generator)
        scale = torch.rand(spec.groups((n, k)), generator=generator) * 0.1 + 0.01
        parts = storage.encode(storage.Codes(codes, scale), spec)
    else:
        spread = torch.rand(n, 1, generator=generator) + 0.5
        weight = spread * (torch.randn(n, k, generator=generator) + torch.randn(n, 1, generator=generator)) / 20
        weight[: n // 8] = 0.0
        parts = quantize_weight(weight, METHODS.get("rtn")(), spec).parts
    return list(parts.values()), storage.decode(parts, spec, (n, k), torch.float32).double()


def operands_of(request, rows, generator):
    """Operands for a prologue and for an epilogue."""
    before, after, width = [], [], request.n
    for name in request.prologue:
        is_order = name == "order"
        before.append(torch.randperm(request.k, generator=generator).int() if is_order
                      else (torch.rand(request.k, generator=generator) + 0.5).to(request.dtype))  # fmt: skip
    for name in request.epilogue:
        width = width // 2 if narrows(name) else width
        kind = fusion(name).operand
        if kind:
            shape = (width,) if kind == "vector" else (rows, width)
            after.append(torch.randn(shape, generator=generator).to(request.dtype))
    return before, after


def run(case):
    """Which target served the case, its relative error, and whether a second run gave the same bits.

    rounding: the error against float64 of the input as it was quantized, which leaves that of the kernel alone.
    capability: of the GPU whose tiles are taken, 90 if the case does not say.
    """
    tiles._INTERPRETED = replace(tiles._INTERPRETED, capability=case.get("capability", 90))
    tiles.device_facts.cache_clear()
    generator = torch.Generator().manual_seed(0)
    spec, dtype = WeightSpec.parse(case["spec"]), getattr(torch, case["dtype"])
    act = ActSpec.parse(case.get("act", "float"))
    request = KernelRequest(
        spec, case["n"], case["k"], dtype, "cpu", act, tuple(case.get("prologue", ())), tuple(case.get("epilogue", ()))
    )
    parts, weight = stored_parts(spec, request.n, request.k, generator)
    before, after = operands_of(request, case["rows"], generator)
    x = torch.randn(case["rows"], request.k, generator=generator).to(dtype)
    entered = apply_fusions(request.prologue, x.double(), before)
    given = [static_scale(entered.abs().amax(0), act)] if act.is_static else []
    kernel = kernel_for(request)
    got = kernel(x, parts, [*before, *given, *after])
    again = kernel(x, parts, [*before, *given, *after])
    exact = apply_fusions(request.epilogue, entered @ weight.T, after)
    quantized = entered
    if act.dtype is not None:
        codes, scale = quantize_input(entered.to(dtype), act, *given)
        quantized = codes.double() * scale.double()
    rounded = apply_fusions(request.epilogue, quantized @ weight.T, after)
    return {
        "target": kernel.target, "error": relative(got, exact), "rounding": relative(got, rounded),
        "same": torch.equal(got, again), "shape": list(got.shape),
    }  # fmt: skip


def relative(got, exact):
    """The relative error of a result."""
    return float((got.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    json.dump([run(case) for case in json.load(sys.stdin)], sys.stdout)
