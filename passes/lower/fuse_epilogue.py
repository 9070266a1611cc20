"""Pass fuse-epilogue: what only happens to the result of a product moves into its request.

y is the value so far, f the step that alone reads it:

1. f = y + b, y * s with a vector [features]      -> bias, scale; also a number s, or b that y's dtype holds
2. f = y + z, y * z with z of exactly y's shape   -> add, mul
3. f = silu, gelu, relu, sigmoid, tanh (y)        -> itself; relu(y) ** 2 -> relu2
4. f = act(y[..., :n/2]) * y[..., n/2:]           -> gate_act     (slices, chunk or split)
5. f = dropout outside training, a cast to y's own dtype, contiguous   -> nothing
6. f = a cast to a wider float, and back later    -> nothing: kernels keep float32 behind the product
Steps are taken one by one as long as the target that serves the product serves the longer chain as well; after a cast
to a wider type, only if the chain comes back to the dtype of the product.
It does not fire where a value has another reader, where shapes broadcast, where the input or an operand is written in
place somewhere, and in training.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ptqc.passes.lower.epilogue_steps import Following, extended, following
from ptqc.passes.lower.site import accepts, movable, operands_of, request_of, rewrite, x_of
from ptqc.pipeline import Context, Pass
from ptqc.program import value_of
from ptqc.requests import KernelRequest

__all__ = ["FuseEpilogue"]


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """Grow every site downwards."""

    name: ClassVar[str] = "fuse-epilogue"

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many sites took in a step."""
        sites, unsafe = movable(module.graph, context)
        return sum(_Chain(module, context, unsafe, site).fuse() for site in sites)


@dataclass
class _Chain:
    """A site and the steps behind it."""

    module: fx.GraphModule
    context: Context
    unsafe: frozenset[fx.Node]
    site: fx.Node

    def fuse(self) -> bool:
        """Take in as many steps as the target allows; True if there were any."""
        request, operands = request_of(self.site), operands_of(self.site)
        value = last = self.site
        best = request, operands
        while (step := following(value, request)) is not None and self._is_usable(step, request):
            if step.fusion is not None:
                longer = extended(request, step.fusion)
                if not accepts(self.context, self.site, request, longer, step.fusion):
                    break
                request = longer
                operands = operands if step.operand is None else [*operands, self._operand(step, request)]
            value = step.result
            if value_of(value).dtype == request.dtype:
                last, best = value, (request, operands)
        if last is self.site:
            return False
        self._replace(last)
        rewrite(self.site, best[0], x_of(self.site), best[1])
        return True

    def _is_usable(self, step: Following, request: KernelRequest) -> bool:
        if isinstance(step.operand, float):
            return step.fusion == "scale" or torch.tensor(step.operand).to(request.dtype).item() == step.operand
        return step.operand not in self.unsafe

    def _operand(self, step: Following, request: KernelRequest) -> fx.Node:
        """The node of an operand; a number becomes a vector."""
        if isinstance(step.operand, fx.Node):
            return step.operand
        name = f"{step.result.name}_number"
        dtype = torch.float32 if step.fusion == "scale" else request.dtype
        vector = torch.full((request.width,), step.operand or 0.0, dtype=dtype, device=request.device)
        self.module.register_buffer(name, vector)
        with self.module.graph.inserting_before(self.site):
            return self.module.graph.get_attr(name)

    def _replace(self, last: fx.Node) -> None:
        """Put the site in the place of the last step it has taken in, and erase the steps."""
        taken, waiting = {last}, list(self.site.users)
        while waiting:
            node = waiting.pop()
            if node not in taken:
                taken.add(node)
                waiting += list(node.users)
        last.prepend(self.site)
        self.site.meta = dict(last.meta)
        last.replace_all_uses_with(self.site)
        for node in sorted(taken, reverse=True):
            self.module.graph.erase_node(node)
