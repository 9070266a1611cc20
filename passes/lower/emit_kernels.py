"""Pass emit-kernels: a kernel in the place of every site.

1. product(x, parts, operands)   -> kernel(x, parts as the kernel wants them, operands)
Parts that a kernel holds in an order of its own are made once for all graphs (`ptqc.passes.lower.prepared`), and the
weights hold them in that order alone, unless a graph reads them as they are stored too. Attributes that nothing reads
any more leave the module. The pass fires for every site.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx

from ptqc.passes.lower.prepared import give_up_parts, prepared_parts
from ptqc.passes.lower.site import operands_of, parts_of, request_of, x_of
from ptqc.pipeline import ChosenKernel, Context, Pass, Site
from ptqc.requests import Kernel

__all__ = ["EmitKernels"]


@dataclass(frozen=True)
class EmitKernels(Pass):
    """The last step before Inductor."""

    name: ClassVar[str] = "emit-kernels"

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many kernels were put into the graph."""
        emitter = _Emitter(module, context)
        for node in sorted(context.sites):
            site = context.sites[node]
            kernel = context.kernel(request_of(node))
            context.chosen.append((site, ChosenKernel(site.names, request_of(node), kernel, tuple(site.left))))
            emitter.emit(node, kernel, site)
        _forget_unread(module)
        context.sites.clear()
        return len(context.chosen)


@dataclass
class _Emitter:
    """attributes: of each tensor of the module; one tensor must not have two. readers: nodes that name an attribute."""

    module: fx.GraphModule
    context: Context
    attributes: dict[Tensor, str] = field(default_factory=dict)
    readers: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.attributes = {tensor: name for name, tensor in self.module.named_buffers()}
        self.readers = Counter(str(node.target) for node in self.module.graph.nodes if node.op == "get_attr")

    def emit(self, node: fx.Node, kernel: Kernel, site: Site) -> None:
        """Put a kernel in the place of a site, and let the site's weights go as they were stored."""
        prepared = prepared_parts(kernel.layout, site.weights)
        with self.module.graph.inserting_before(node):
            parts = [self._attribute(part, f"{node.name}_{kernel.target}_{i}") for i, part in enumerate(prepared)]
            made = self.module.graph.call_function(kernel.call, kernel.arguments(x_of(node), parts, operands_of(node)))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        stored = parts_of(node)
        self.module.graph.erase_node(node)
        self._drop(stored)
        if not self.context.keeps_stored:
            self.context.unused += give_up_parts(kernel.layout, site.weights, prepared)

    def _attribute(self, tensor: Tensor, name: str) -> fx.Node:
        if tensor not in self.attributes:
            self.attributes[tensor] = name
            self.module.register_buffer(name, tensor)
        name = self.attributes[tensor]
        self.readers[name] += 1
        return self.module.graph.get_attr(name)

    def _drop(self, parts: list[fx.Node]) -> None:
        """Erase the parts of a site, and the tensors that no other node names."""
        for part in parts:
            sources = part.all_input_nodes
            for node in (part, *sources):
                if not node.users:
                    self._erase(node)

    def _erase(self, node: fx.Node) -> None:
        self.module.graph.erase_node(node)
        if node.op == "get_attr":
            name = str(node.target)
            self.readers[name] -= 1
            if self.readers[name] == 0:
                if self.attributes.get(tensor := getattr(self.module, name)) == name:
                    del self.attributes[tensor]
                delattr(self.module, name)


def _forget_unread(module: fx.GraphModule) -> None:
    """Erase get_attr nodes that nothing reads, and the tensors that no node names."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    named = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False))]:
        if name not in named:
            delattr(module, name)
