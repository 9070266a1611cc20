"""Sites: products with stored weights on their way to kernels.

A site is a node that calls a `Product`: a request for a kernel that runs its own reference. A graph with sites is
complete, so it can be run, printed and compared after every pass.

    product(x, [[parts of a weight], ...], [operands])      the results of several weights lie side by side

The operands are those of `KernelRequest.operands`. What no longer fits into the node (the stored weights, their names)
is in `Context.sites`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ptqc import ops
from ptqc.fusions import apply_fusions, takes_operand
from ptqc.passes.lower.in_place import is_in_place, written
from ptqc.pipeline import Context
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec

__all__ = [
    "Product", "accepts", "erase_unused", "movable", "operands_of", "parts_of", "product_node", "request_of", "rewrite",
    "x_of",
]  # fmt: skip


@dataclass(frozen=True)
class Product:
    """What a site calls: the reference of a request, in the dtype of its input.

    stored_as: the spec of the parts; that of the request is how they are stored once they are one weight.

    x: [..., in]; parts: of every weight; operands: [features], or [..., features]. Returns [..., width].
    """

    request: KernelRequest
    stored_as: WeightSpec

    def __call__(self, x: Tensor, parts: Sequence[Sequence[Tensor]], operands: Sequence[Tensor]) -> Tensor:
        request, rest = self.request, list(operands)
        before = [rest.pop(0) for name in request.prologue if takes_operand(name)]
        x = apply_fusions(request.prologue, x, before)
        if request.act.dtype is not None:
            x = ops.fake_quantize(x, str(request.act), rest.pop(0) if request.act.is_static else None)
        products = [ops.linear(x, list(stored), str(self.stored_as), None) for stored in parts]
        return apply_fusions(request.epilogue, products[0] if len(parts) == 1 else torch.cat(products, -1), rest)

    @property
    def __name__(self) -> str:
        return str(self.request)


def product_node(
    graph: fx.Graph,
    request: KernelRequest,
    x: fx.Node,
    parts: Sequence[Sequence[fx.Node]],
    operands: Sequence[fx.Node],
    stored_as: WeightSpec,
) -> fx.Node:
    """A new site where the graph is being written."""
    arguments = (x, [list(stored) for stored in parts], list(operands))
    return graph.create_node("call_function", Product(request, stored_as), arguments, name="product")


def request_of(site: fx.Node) -> KernelRequest:
    """The request that a site stands for."""
    assert isinstance(site.target, Product)
    return site.target.request


def x_of(site: fx.Node) -> fx.Node:
    """The input of a site."""
    x = site.args[0]
    assert isinstance(x, fx.Node)
    return x


def parts_of(site: fx.Node) -> list[fx.Node]:
    """The parts of all weights of a site."""
    return [part for stored in site.args[1] for part in stored]  # type: ignore


def operands_of(site: fx.Node) -> list[fx.Node]:
    """What a site takes besides its input and its weights."""
    return list(site.args[2])  # type: ignore[arg-type]


def rewrite(site: fx.Node, request: KernelRequest, x: fx.Node, operands: Sequence[fx.Node]) -> None:
    """Make a site another request, with another input and other operands."""
    assert isinstance(site.target, Product)
    site.target = Product(request, site.target.stored_as)
    site.args = (x, site.args[1], list(operands))


def movable(graph: fx.Graph, context: Context) -> tuple[list[fx.Node], frozenset[fx.Node]]:
    """The sites that may move, and the nodes whose memory something writes.

    Such a site may be computed later, or together with others: nothing writes what it reads, and no derivative goes
    through it.
    """
    unsafe = written(graph)
    sites = [site for site in context.sites if not request_of(site).needs_grad]
    return [site for site in sites if unsafe.isdisjoint([x_of(site), *operands_of(site)])], unsafe


def accepts(context: Context, site: fx.Node, before: KernelRequest, after: KernelRequest, step: str) -> bool:
    """True if the target that would serve `before` also serves `after`; if not, the site remembers why.

    The reference, which fuses nothing, leaves a step to Inductor in this way.
    """
    target = context.target(before)
    if context.target(after) == target:
        return True
    reason = dict(context.refusals(after)).get(str(target), "it would go to another target")
    context.sites[site].left.append(f"{step} ({target}: {reason})")
    return False


def erase_unused(node: fx.Node) -> None:
    """Erase a node that nothing reads, and then whatever it alone had read; never inputs or what writes in place."""
    waiting = [node]
    while waiting:
        last = waiting.pop()
        if not last.users and last.op not in ("placeholder", "output") and not is_in_place(last):
            read = list(last.all_input_nodes)
            last.graph.erase_node(last)
            waiting += [source for source in read if not source.users]
