"""Pass emit-kernels: a kernel in the place of every site.

1. product(x, parts, operands)   -> kernel(x, parts as the kernel wants them, operands)
Parts that a kernel holds in an order of its own are made once for all graphs that run the same kernel on the same
weights. Attributes that nothing reads any more leave the module. The pass fires for every site.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from ptqc import storage
from ptqc.passes.lower.site import operands_of, request_of, x_of
from ptqc.pipeline import ChosenKernel, Context, Pass, Site
from ptqc.requests import Kernel

__all__ = ["EmitKernels"]


_Weak = list[TensorWeakRef]


@dataclass(frozen=True)
class EmitKernels(Pass):
    """The last step before Inductor."""

    name: ClassVar[str] = "emit-kernels"

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many kernels were put into the graph."""
        held = {tensor: name for name, tensor in module.named_buffers()}
        for node in sorted(context.sites):
            site = context.sites[node]
            kernel = context.kernel(request_of(node))
            context.chosen.append((site, ChosenKernel(site.names, request_of(node), kernel, tuple(site.left))))
            _emit(module, node, kernel, site, held)
        _forget_unread(module)
        context.sites.clear()
        return len(context.chosen)


def _emit(module: fx.GraphModule, node: fx.Node, kernel: Kernel, site: Site, held: dict[Tensor, str]) -> None:
    """held: the attribute of each tensor of the module; one tensor must not have two."""
    with module.graph.inserting_before(node):
        parts = []
        for index, part in enumerate(_prepared(kernel, site)):
            if part not in held:
                held[part] = f"{node.name}_{kernel.target}_{index}"
                module.register_buffer(held[part], part)
            parts.append(module.graph.get_attr(held[part]))
        made = module.graph.call_function(kernel.call, kernel.arguments(x_of(node), parts, operands_of(node)))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


_prepared_parts: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""First weight -> (what prepares, ids of the other weights) -> weak references: those weights, what was prepared."""


def _prepared(kernel: Kernel, site: Site) -> Sequence[Tensor]:
    """The parts of a site's weights as its kernel wants them, from another graph if that still holds them."""
    first, *others = site.weights
    made: dict[tuple[Any, ...], tuple[_Weak, _Weak]] = _prepared_parts.setdefault(first, {})
    key = (kernel.prepare, *map(id, others))
    if key in made:
        same, held = ([reference() for reference in references] for references in made[key])
        if all(old is new for old, new in zip(same, others, strict=True)):
            alive = [part for part in held if part is not None]
            if len(alive) == len(held):
                return alive
    parts = storage.concat([weight.parts for weight in site.weights], first.spec, first.stored_shape[-1])
    prepared = list(kernel.prepare(list(parts.values())))
    made[key] = [TensorWeakRef(weight) for weight in others], [TensorWeakRef(part) for part in prepared]
    return prepared


def _forget_unread(module: fx.GraphModule) -> None:
    """Erase get_attr nodes that nothing reads, and the tensors that no node names."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    named = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))]:
        if name not in named:
            delattr(module, name)
