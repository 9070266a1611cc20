"""How long and how large quantizing will be: a simple model of its work over speeds measured on this machine.

    forward    2 x weights x tokens operations for each pass over the calibration data, twice where piece by piece
    gram       2 x tokens x in^2 for each value whose second moments are collected
    solve      in^3 for its factorisation, 2 x out x in^2 for the error feedback of each weight that reads it
    choose     methods without data: time per weight, measured on a small random matrix

Matrix products and factorisations are counted at the measured rate of float32 products, memory as the model, its
quantized weights and the largest set of temporaries. These are estimates: expect a factor of two.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ptqc.methods import Method
from ptqc.spec import WeightSpec

__all__ = ["Cost", "Shape", "estimate_bytes", "estimate_seconds", "product_rate", "seconds_per_weight"]

_MEASURED_FOR = 0.08
"""Seconds spent on measuring one speed."""
_SOLVE_SLOWDOWN = 3.0
"""Factorisations and error feedback against plain products: measured 2 to 4, November 2026, 2 CPU cores."""


@dataclass(frozen=True)
class Shape:
    """One weight to quantize. source: what its input value is called, alike for weights that read the same value."""

    lead: int
    out_features: int
    in_features: int
    source: str

    @property
    def numel(self) -> int:
        """Weights in it."""
        return self.lead * self.out_features * self.in_features


@dataclass(frozen=True)
class Cost:
    """What is known about a run. parameters: that a token passes through. tokens: of calibration, 0 without data."""

    shapes: Sequence[Shape]
    needs: Collection[str]
    parameters: int
    tokens: int
    passes: int = 2


def product_rate() -> float:
    """Float operations a second of a float32 matrix product on this CPU, with the threads that torch has."""
    matrix = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    torch.mm(matrix, matrix)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < _MEASURED_FOR:
        torch.mm(matrix, matrix)
        done += 1
    return done * 2 * 512**3 / (time.perf_counter() - started)


def seconds_per_weight(method: Method, spec: WeightSpec) -> float:
    """Time that a method without data takes for one weight."""
    width = 2 * (spec.group or 512) if spec.group is None or spec.group < 4096 else spec.group
    matrix = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    fitted = spec.fit(matrix.shape)
    method.choose(matrix, fitted, {})
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < _MEASURED_FOR:
        method.choose(matrix, fitted, {})
        done += 1
    return (time.perf_counter() - started) / done / matrix.numel()


def estimate_seconds(cost: Cost, per_weight: float) -> float:
    """Seconds of a run on this machine. per_weight: seconds to choose one code, where no solver does."""
    if not cost.tokens:
        return per_weight * sum(shape.numel for shape in cost.shapes)
    work = 2.0 * cost.parameters * cost.tokens * cost.passes
    if "hessian" in cost.needs:
        values = {shape.source: shape for shape in cost.shapes}.values()
        work += sum(2.0 * cost.tokens * shape.in_features**2 for shape in values)
        work += _SOLVE_SLOWDOWN * sum(float(shape.lead * shape.in_features**3) for shape in values)
        work += _SOLVE_SLOWDOWN * sum(2.0 * shape.numel * shape.in_features for shape in cost.shapes)
    return work / product_rate() + per_weight * sum(shape.numel for shape in cost.shapes)


def estimate_bytes(cost: Cost, model_bytes: int, quantized_bytes: int, is_streamed: bool) -> int:
    """Largest memory of a run: what is held throughout, and the temporaries of the largest weight.

    is_streamed: weights come from disk one at a time and go back there.
    """
    weights = max((4 * shape.numel for shape in cost.shapes), default=0)
    moments = max((4 * shape.lead * shape.in_features**2 for shape in cost.shapes), default=0)
    temporaries = 3 * weights + (4 * moments if "hessian" in cost.needs else 0)
    width = max((shape.in_features for shape in cost.shapes), default=0)
    activations = 2 * 4 * cost.tokens * width
    held = 0 if is_streamed else model_bytes + quantized_bytes
    return held + temporaries + activations
