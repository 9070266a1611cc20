"""Merge the statistics of all processes: sums are added, maxima maximized, sampled rows gathered.

Works with any backend of torch.distributed, gloo on CPUs.
"""

from typing import Any

import torch.distributed as dist

from ptqc.reservoir import Reservoir
from ptqc.statistics import Statistics

__all__ = ["gathered", "is_alone", "reduce_statistics"]


def is_alone() -> bool:
    """Whether this is the only process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def gathered(value: Any) -> list[Any]:
    """The value of every process, in order of rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def reduce_statistics(statistics: Statistics) -> None:
    """Give every process the sums of all, in place. Each has an accumulator of the same kind."""
    sums = (statistics.sum_abs, statistics.sum, statistics.sum_square, statistics.product)
    for tensor in (statistics.count, *sums):
        if tensor is not None:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
    dist.all_reduce(statistics.absmax, dist.ReduceOp.MAX)
    if not statistics.reservoirs:
        return
    own = [(reservoir.rows.cpu(), reservoir.priority.cpu()) for reservoir in statistics.reservoirs]
    for rank, others in enumerate(gathered(own)):
        if rank == dist.get_rank():
            continue
        for mine, (rows, priority) in zip(statistics.reservoirs, others, strict=True):
            mine.merge(Reservoir(mine.capacity, rows, priority))
