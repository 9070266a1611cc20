"""Random stored weights and activations, run through the C++ target whatever target would be chosen."""

from dataclasses import dataclass

import torch

from ptqc import storage
from ptqc.codegen.build import load_text
from ptqc.codegen.targets.cpp import Cpp
from ptqc.fusions import apply_fusions, fusion, takes_operand
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec

QUANTIZED = 1.2e-2
"""Largest relative error with int8 activations."""
EXACT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Case:
    """parts and weight [n, k] float64 that they stand for; x [rows, k]; one operand for each fusion that takes one."""

    request: KernelRequest
    parts: list
    weight: torch.Tensor
    x: torch.Tensor
    operands: list

    def expected(self, x=None):
        before = sum(takes_operand(name) for name in self.request.prologue)
        operands = [operand.double() if operand.is_floating_point() else operand for operand in self.operands]
        value = apply_fusions(self.request.prologue, (self.x if x is None else x).double(), operands[:before])
        behind = operands[before + self.request.act.is_static :]
        return apply_fusions(self.request.epilogue, value @ self.weight.T, behind)

    def run(self):
        module = load_text(Cpp().emit(self.request).text)
        return module.run(self.x, module.prepare(self.parts), self.operands)


def case(name, n, k, rows=3, dtype=torch.float32, seed=0, **request):
    """A case with random codes, scales and zeros."""
    spec, seeded = WeightSpec.parse(name), torch.Generator().manual_seed(seed)
    parts = random_parts(spec, n, k, seeded)
    weight = storage.decode(parts, spec, (n, k), torch.float64)
    request = KernelRequest(spec, n, k, dtype, "cpu", **request)
    x = torch.randn(rows, k, generator=seeded).to(dtype)
    before = [_operand(fusion(name), name, rows, k, dtype, seeded) for name in request.prologue if takes_operand(name)]
    scale = [torch.tensor(0.03)] if request.act.is_static else []
    behind, width = [], n
    for step in request.epilogue:
        width = n // 2 if step.startswith("gate_") else width
        if takes_operand(step):
            behind.append(_operand(fusion(step), step, rows, width, dtype, seeded))
    return Case(request, [parts[part] for part in storage.part_names(spec)], weight, x, [*before, *scale, *behind])


def random_parts(spec, n, k, seeded):
    """Parts of a weight of random codes."""
    columns = -(-k // (spec.group or k))
    groups = (-(-n // (spec.rows or n)), columns)
    if spec.book is not None and spec.book.float_dtype is not None:
        codes = torch.randn(n, k, generator=seeded).to(spec.book.float_dtype)
    else:
        most = 3 if spec.codebook == "ternary" else 2**spec.bits
        codes = torch.randint(0, most, (n, k // spec.vector), generator=seeded)
        codes = codes if spec.bits > 8 else codes.to(torch.uint8)
    scale = torch.rand(groups, generator=seeded) * 0.02 + 0.005
    zero = {
        "none": lambda: None,
        "int": lambda: torch.randint(0, 2**spec.bits, groups, generator=seeded),
        "float": lambda: torch.rand(groups, generator=seeded) * 2**spec.bits,
        "min": lambda: torch.rand(groups, generator=seeded) * 2**spec.bits * scale,
    }[spec.zero]()
    return storage.encode(storage.Codes(codes, scale, zero), spec)


def _operand(step, name, rows, features, dtype, seeded):
    if name == "order":
        return torch.randperm(features, generator=seeded).int()
    shape = (rows, features) if step.operand == "matrix" else (features,)
    return torch.randn(shape, generator=seeded).to(dtype)


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())
