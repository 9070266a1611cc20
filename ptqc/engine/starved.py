"""Weights whose input calibration has hardly seen: experts that few tokens reached, towers that never ran.

Statistics of a handful of rows are worse than none: a method would fit them exactly. Such a weight, or such experts of
a stack, get statistics that say nothing (white inputs), under which every method does what it does without data.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ptqc.engine.jobs import Job
from ptqc.engine.report import Report

__all__ = ["FEWEST_ROWS", "informed"]

FEWEST_ROWS = 32
"""Rows under which statistics of an input are not used."""


def informed(job: Job, statistics: Mapping[str, Tensor], report: Report) -> Mapping[str, Tensor]:
    """The statistics, with those of starved experts replaced by white ones. What was replaced goes to the report."""
    if not job.needs:
        return statistics
    lead = job.shape[:-2]
    count = statistics.get("count", torch.zeros(lead))
    seen = count.expand(lead) if lead else count.reshape(())
    if lead:
        report.coverage[job.name] = tuple(int(rows) for rows in seen.flatten())
    starved = seen < FEWEST_ROWS
    if not bool(starved.any()):
        return statistics
    report.note(_said(job, starved, seen), job.name)
    if not lead or not statistics:
        return {name: _white(name, (*lead, *_shape(name, job.shape[-1]))) for name in job.needs} | {"count": seen}
    return {
        name: value if name == "count" else torch.where(_aligned(starved, value), _white(name, value.shape), value)
        for name, value in statistics.items()
    }


def _aligned(starved: Tensor, value: Tensor) -> Tensor:
    return starved.reshape(*starved.shape, *[1] * (value.ndim - starved.ndim))


def _shape(name: str, width: int) -> tuple[int, ...]:
    return {"hessian": (width, width), "rows": (width, width)}.get(name, (width,))


def _white(name: str, shape: Sequence[int]) -> Tensor:
    """What independent inputs of variance 1 would have given, [..., in] or [..., n, in]."""
    if name in ("hessian", "rows"):
        return torch.eye(shape[-2], shape[-1]).expand(tuple(shape)).contiguous()
    return torch.zeros(tuple(shape)) if name == "mean" else torch.ones(tuple(shape))


def _said(job: Job, starved: Tensor, seen: Tensor) -> str:
    if job.shape[:-2]:
        return f"{int(starved.sum())} of {starved.numel()} experts saw under {FEWEST_ROWS} rows; no data used for them"
    rows = int(seen)
    what = "its input never came by in calibration" if rows == 0 else f"calibration has only {rows} rows for it"
    return f"{what}; quantized without data"
