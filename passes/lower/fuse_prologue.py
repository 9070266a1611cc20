"""Pass fuse-prologue: what is done to the input of a product moves into its request.

x is the input of a site, and is

1. index_select(u, -1, o)           -> order
2. u * s with a vector [features]   -> scale    (but for the gain of a norm, which goes with the norm or stays)
3. an RMS norm of u (`ptqc.passes.lower.rms_norm`), if this site alone reads it and every value on the way -> rms_norm
4. dropout outside training, a cast to its own dtype, contiguous                                           -> nothing
Steps are taken one by one, from the product upwards, as long as the target that serves the product serves the longer
chain as well. Rules 1 and 2 fire for every site that reads the value: they cost a kernel less than a value in memory.
It does not fire where u is of another dtype or is written in place somewhere, and in training.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from ptqc.passes.lower.epilogue_steps import is_nothing
from ptqc.passes.lower.rms_norm import Gain, RmsNorm, rms_norm_of
from ptqc.passes.lower.site import accepts, erase_unused, movable, operands_of, request_of, rewrite, x_of
from ptqc.pipeline import Context, Pass
from ptqc.program import value_of
from ptqc.requests import KernelRequest
from ptqc.views import function_name

__all__ = ["FusePrologue"]


@dataclass(frozen=True)
class FusePrologue(Pass):
    """Grow every site upwards."""

    name: ClassVar[str] = "fuse-prologue"

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many sites took in a step."""
        sites, unsafe = movable(module.graph, context)
        return sum(_Chain(module, context, unsafe, site).fuse() for site in sites)


@dataclass(frozen=True)
class _Before:
    """u: the value before the step. request: with the step taken in. operand: what the step takes."""

    u: fx.Node
    request: KernelRequest
    step: str
    operand: fx.Node | None = None


@dataclass
class _Chain:
    """A site and the steps before it."""

    module: fx.GraphModule
    context: Context
    unsafe: frozenset[fx.Node]
    site: fx.Node

    def fuse(self) -> bool:
        """Take in as many steps as the target allows; True if there were any."""
        count = 0
        while self._take_one():
            count += 1
        return count > 0

    def _take_one(self) -> bool:
        x, request = x_of(self.site), request_of(self.site)
        found = next((step for read in _READERS if (step := read(self, x, request)) is not None), None)
        if found is None or found.u in self.unsafe or value_of(found.u).dtype != request.dtype:
            return False
        if found.request is not request and not accepts(self.context, self.site, request, found.request, found.step):
            return False
        operands = operands_of(self.site)
        operands = operands if found.operand is None else [found.operand, *operands]
        rewrite(self.site, found.request, found.u, operands)
        erase_unused(x)
        return True

    # ---------------------------------------------------------------- one reader for each rule

    def _order(self, x: fx.Node, request: KernelRequest) -> _Before | None:
        if x.target is not torch.index_select or len(x.args) != 3 or x.args[1] not in (-1, value_of(x).ndim - 1):
            return None
        u, _, order = x.args
        if not isinstance(u, fx.Node) or not isinstance(order, fx.Node) or order.op != "get_attr":
            return None
        tensor = getattr(self.module, str(order.target))
        is_whole = tensor.dtype == torch.int32 and tensor.shape == (request.k,)
        return _Before(u, _preceded(request, "order"), "order", order) if is_whole else None

    def _scale(self, x: fx.Node, request: KernelRequest) -> _Before | None:
        if function_name(x) not in ("mul", "__mul__") or len(x.args) != 2 or x.kwargs or rms_norm_of(x) is not None:
            return None
        for u, scale in (x.args, x.args[::-1]):
            if not isinstance(u, fx.Node) or not isinstance(scale, fx.Node) or scale.op != "get_attr":
                continue
            tensor, is_value = getattr(self.module, str(scale.target)), isinstance(value_of(u), Tensor)
            if is_value and u.op != "get_attr" and tensor.shape == (request.k,) and tensor.dtype == request.dtype:
                return _Before(u, _preceded(request, "scale"), "scale", scale)
        return None

    def _norm(self, x: fx.Node, request: KernelRequest) -> _Before | None:
        norm = rms_norm_of(x)
        if norm is None or value_of(x).dtype != request.dtype or not _is_private(x, norm, self.site):
            return None
        gain = self._gain(norm.gain, request)
        if gain is None:
            return None
        step = f"rms_norm:{norm.eps!r}"
        return _Before(norm.h, _preceded(request, step), step, gain)

    def _nothing(self, x: fx.Node, request: KernelRequest) -> _Before | None:
        u = x.args[0] if x.args else None
        return _Before(u, request, "nothing") if isinstance(u, fx.Node) and is_nothing(x, u) else None

    def _gain(self, gain: Gain, request: KernelRequest) -> fx.Node | None:
        """The node of a gain: the parameter itself, or a vector in float32 that is made of it."""
        held = None if gain.parameter is None else getattr(self.module, str(gain.parameter.target)).detach()
        if held is not None and held.shape != (request.k,):
            return None
        if held is not None and gain.offset == 0:
            return gain.parameter
        made = torch.full((request.k,), gain.offset, dtype=torch.float32, device=request.device)
        name = f"{self.site.name}_gain"
        self.module.register_buffer(name, made if held is None else made + held.float())
        with self.module.graph.inserting_before(self.site):
            return self.module.graph.get_attr(name)


_READERS: tuple[Callable[[_Chain, fx.Node, KernelRequest], _Before | None], ...] = (
    _Chain._order,
    _Chain._norm,
    _Chain._scale,
    _Chain._nothing,
)


def _preceded(request: KernelRequest, step: str) -> KernelRequest:
    return replace(request, prologue=(step, *request.prologue))


def _is_private(x: fx.Node, norm: RmsNorm, site: fx.Node) -> bool:
    """True if the site alone reads the norm, and nothing else reads a value between h and it."""
    inside, waiting = {x}, [x]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in inside and source is not norm.h and source.op not in ("get_attr", "placeholder"):
                inside.add(source)
                waiting.append(source)
    return all(user is site or user in inside for node in inside for user in node.users)
