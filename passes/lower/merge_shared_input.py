"""Pass merge-shared-input: products that read the same value become one product, cut into pieces.

For sites on one node, whose requests differ in out_features and bias alone:

1. a gate and what it multiplies, act(x A) * (x B)        -> one site on [A; B], A first
2. the others, in graph order (query, key, value, ...)    -> one site on all of them
The results are slices of the merged one; views of them that need not be views any more become reshapes. Sites whose
result goes into a step that the kernel takes in (an activation, a residual) are left alone, since a slice cannot be
fused.
It does not fire where the reference serves the product, which would save nothing; where the parts cannot be stored as
one (`stored_rows.concat_spec`: scales that rows share); where a bias is computed in the graph; where the shared value
is written in place; upstream of as_strided, which holds the strides of the values that dynamo saw; for more than 8
weights; and in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ptqc import stored_rows
from ptqc.passes.lower.epilogue_steps import activation_of, extended, following
from ptqc.passes.lower.site import movable, operands_of, parts_of, product_node, request_of, x_of
from ptqc.pipeline import Context, Pass, Site
from ptqc.program import value_of
from ptqc.requests import KernelRequest
from ptqc.views import function_name

__all__ = ["MergeSharedInput"]

_MOST = 8
_VIEWS = {"view": "reshape", "view_as": "reshape_as"}
_THROUGH = frozenset(
    {"transpose", "permute", "unsqueeze", "squeeze", "getitem", "expand", "unflatten", "flatten", "split", "chunk",
     "reshape", "view", "view_as", "reshape_as", "mT", "movedim", "swapaxes", "unbind", "select", "narrow"}
)  # fmt: skip


@dataclass(frozen=True)
class MergeSharedInput(Pass):
    """Merge what reads the same value."""

    name: ClassVar[str] = "merge-shared-input"

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many sites became part of another."""
        (sites, unsafe), bound = movable(module.graph, context), _upstream_of_strides(module.graph)
        groups: dict[tuple[fx.Node, KernelRequest, tuple[fx.Node, ...]], list[fx.Node]] = {}
        for site in sites:
            request = request_of(site)
            if site not in bound and context.target(request) not in (None, "reference"):
                alike = replace(request, n=0, epilogue=())
                before = operands_of(site)[: request.operands_before]
                groups.setdefault((x_of(site), alike, tuple(before)), []).append(site)
        merged = [run for found in groups.values() for run in _runs(context, found)]
        return sum(_merge(module, context, run, unsafe) for run in merged)


def _upstream_of_strides(graph: fx.Graph) -> set[fx.Node]:
    """Everything that a node with strides among its arguments depends on."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in found or function_name(node) == "as_strided":
            found.update(node.all_input_nodes)
    return found


def _runs(context: Context, sites: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The sites that become one, for each that is made."""
    runs: list[list[fx.Node]] = []
    rest = list(sites)
    for site in sites:
        partner = _gated_by(site)
        if partner in rest and site in rest:
            runs.append([site, partner])
            rest = [other for other in rest if other not in (site, partner)]
    rest = [site for site in rest if not _grows(context, site)]
    return [run for run in (*runs, rest) if 2 <= len(run) <= _MOST]


def _gated_by(site: fx.Node) -> fx.Node | None:
    """The value that act(site) alone is multiplied with."""
    if len(site.users) != 1:
        return None
    (activated,) = site.users
    if activation_of(activated) is None or len(activated.users) != 1:
        return None
    (product,) = activated.users
    if function_name(product) not in ("mul", "__mul__") or len(product.all_input_nodes) != 2:
        return None
    other = next(node for node in product.all_input_nodes if node is not activated)
    return other if len(other.users) == 1 else None


def _grows(context: Context, site: fx.Node) -> bool:
    request = request_of(site)
    step = following(site, request)
    if step is None or step.fusion is None:
        return False
    return context.target(extended(request, step.fusion)) == context.target(request)


def _merge(module: fx.GraphModule, context: Context, sites: list[fx.Node], unsafe: frozenset[fx.Node]) -> int:
    requests = [request_of(site) for site in sites]
    outs = [request.n for request in requests]
    has_bias = any(request.epilogue for request in requests)
    spec = stored_rows.concat_spec(requests[0].spec, outs, requests[0].k)
    named = requests[0].spec if isinstance(spec, str) else spec
    merged = replace(requests[0], spec=named, n=sum(outs), epilogue=("bias",) if has_bias else ())
    reason = spec if isinstance(spec, str) else _refusal(context, sites, merged, unsafe)
    if reason is not None:
        for site in sites:
            context.sites[site].left.append(f"merging ({reason})")
        return 0
    made = _merged_node(module, sites, merged, requests[0])
    names = tuple(name for site in sites for name in context.sites[site].names)
    weights = tuple(weight for site in sites for weight in context.sites[site].weights)
    context.sites[made] = Site(names, weights)
    start = 0
    for site, out in zip(sites, outs, strict=True):
        cut: Any = (Ellipsis, slice(start, start + out))
        with module.graph.inserting_before(min(sites)):
            piece = module.graph.call_function(getitem, (made, cut))
        piece.meta, start = dict(site.meta), start + out
        site.replace_all_uses_with(piece)
        _loosen(piece)
    for site in sites:
        del context.sites[site]
        module.graph.erase_node(site)
    return len(sites)


def _merged_node(
    module: fx.GraphModule, sites: Sequence[fx.Node], merged: KernelRequest, single: KernelRequest
) -> fx.Node:
    """The site of all, before the first of them. single: the request of the first."""
    first, operands = min(sites), operands_of(sites[0])
    shared = operands[: len(operands) - bool(single.epilogue)]
    parts: list[list[fx.Node]] = [stored for site in sites for stored in site.args[1]]  # type: ignore
    for part in (part for site in sites for part in parts_of(site)):
        for node in (*part.all_input_nodes, part):
            first.prepend(node)
    with module.graph.inserting_before(first):
        bias = [_bias(module, sites)] if merged.epilogue else []
        made = product_node(module.graph, merged, x_of(sites[0]), parts, [*shared, *bias], single.spec)
    seen = value_of(sites[0])
    made.meta = sites[0].meta | {"example_value": seen.new_empty((*seen.shape[:-1], merged.n))}
    return made


def _refusal(
    context: Context, sites: Sequence[fx.Node], merged: KernelRequest, unsafe: frozenset[fx.Node]
) -> str | None:
    """None if the sites may become one, else why not."""
    requests = [request_of(site) for site in sites]
    if any(request_of(site).epilogue and operands_of(site)[-1].op != "get_attr" for site in sites):
        return "a bias is computed in the graph"
    if any(site in unsafe and any(map(_is_view, _views_of(site))) for site in sites):
        return "a view of a result is written in place"
    targets = {context.target(request) for request in requests}
    return None if targets == {context.target(merged)} else "the merged product would go to another target"


def _bias(module: fx.GraphModule, sites: Sequence[fx.Node]) -> fx.Node:
    """One bias for all; zeros for those that have none."""
    pieces: list[Tensor] = []
    for site in sites:
        request = request_of(site)
        if request.epilogue:
            pieces.append(getattr(module, str(operands_of(site)[-1].target)).detach())
        else:
            pieces.append(torch.zeros(request.n, dtype=request.dtype, device=request.device))
    name = f"{sites[0].name}_merged_bias"
    module.register_buffer(name, torch.cat(pieces))
    return module.graph.get_attr(name)


def _views_of(node: fx.Node) -> list[fx.Node]:
    """Everything that reads a value or a view of it."""
    found, waiting = [], [node]
    while waiting:
        for user in waiting.pop().users:
            found.append(user)
            if function_name(user) in _THROUGH:
                waiting.append(user)
    return found


def _is_view(node: fx.Node) -> bool:
    """True for a method that promises to share memory, and fails where it cannot."""
    return node.op == "call_method" and node.target in _VIEWS and not isinstance(node.args[1], torch.dtype)


def _loosen(piece: fx.Node) -> None:
    """Views of a slice: the same numbers, copied where the slice cannot be viewed so."""
    for user in _views_of(piece):
        if _is_view(user):
            user.target = _VIEWS[str(user.target)]
