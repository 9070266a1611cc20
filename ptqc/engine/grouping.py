"""The scale groups that a run works on."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ptqc.capture import capture
from ptqc.engine.jobs import Job, transforms_of
from ptqc.groups import ScaleGroup
from ptqc.passes.groups.find import find_groups
from ptqc.program import Program, program

__all__ = ["groups_for"]

log = logging.getLogger("ptqc")

_FEW_TOKENS = 16


def groups_for(
    model: nn.Module, programs: Sequence[Program], batch: Mapping[str, Any], jobs: Sequence[Job], *, is_whole: bool
) -> list[ScaleGroup]:
    """Scale groups for the transforms of the jobs, none if no transform scales.

    programs: the graphs of the model on `batch`. is_whole: they are one graph, with known inputs. Then groups are
    looked for on a few tokens where the batch is nothing but tokens: which there are does not depend on how many, and
    following channels through long graphs takes time. Folds are checked on the graph itself.
    """
    if not any(transform.has_scale for transform in transforms_of(jobs)):
        return []
    short = _shortened(batch) if is_whole else None
    if short is None:
        return find_groups(programs)
    try:
        return find_groups([program(graph, model, short) for graph in capture(model, short, is_run=False)])
    except Exception as error:  # a model may insist on a length
        log.info("scale groups are looked for on the whole batch (%s)", type(error).__name__)
        return find_groups(programs)


def _shortened(batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """A row of a few tokens; None if the batch is as short, or holds anything else."""
    shapes = {value.shape for value in batch.values()}
    is_tokens = all(value.ndim == 2 and not value.is_floating_point() for value in batch.values()) and len(shapes) == 1
    if not is_tokens or next(iter(shapes))[1] <= _FEW_TOKENS:
        return None
    return {name: value[:1, :_FEW_TOKENS].contiguous() for name, value in batch.items()}
