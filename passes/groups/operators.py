"""Operators: what each ATen operator does to the labels of its operands.

An operator that is in none of the tables kills what enters it, with its name as the reason.
"""

import logging

from torch import fx

from ptqc.passes.groups.elementwise import ELEMENTWISE
from ptqc.passes.groups.layers import LAYERS
from ptqc.passes.groups.moves import KNOWN_FAILURES, is_symbolic, operator_name
from ptqc.passes.groups.places import PLACES
from ptqc.passes.groups.reductions import REDUCTIONS
from ptqc.passes.groups.trace import Result, Rule, Trace

__all__ = ["RULES", "apply"]

log = logging.getLogger("ptqc")

_SHAPE_ONLY = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
     "new_full", "new_empty", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset"}
)  # fmt: skip


def _nothing(trace: Trace, node: fx.Node) -> Result:
    return None


RULES: dict[str, Rule] = {
    **dict.fromkeys(_SHAPE_ONLY, _nothing),
    **ELEMENTWISE,
    **PLACES,
    **REDUCTIONS,
    **LAYERS,
}
"""ATen operator -> rule."""


def apply(trace: Trace, node: fx.Node) -> Result:
    """Labels of a node from those of its inputs."""
    name = operator_name(node)
    if name not in _SHAPE_ONLY and any(is_symbolic(one) for one in (node, *node.all_input_nodes)):
        trace.kill_inputs(node, "meets a size that depends on the data")
        return None
    rule = RULES.get(name)
    if rule is not None:
        try:
            return rule(trace, node)
        except KNOWN_FAILURES as failure:
            log.debug("labels of %s: %s", node.format_node(), failure)
            trace.kill_inputs(node, f"passes through a form of {name} that is not known")
            return None
    trace.kill_inputs(node, f"passes through {name}, which is not known to keep a scale")
    return None
