"""What a graph pass is, and how passes run one after another.

A pass is a frozen dataclass whose fields are its options; it rewrites a graph in place and returns how many places it
changed. Zero means that it did not fire; the context then holds the reasons. With PTQC_DUMP=<dir> the graph is written
there as text after every pass.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import ClassVar

from torch import fx

from ptqc.attention import Attend, AttentionRequest
from ptqc.errors import PtqcError
from ptqc.qtensor import QuantTensor
from ptqc.requests import Kernel, KernelRequest

__all__ = ["ChosenKernel", "Context", "Pass", "Pipeline", "Site", "dump"]

log = logging.getLogger("ptqc")
_dump_number = count()


def _no_kernel(request: KernelRequest) -> Kernel:
    raise PtqcError(f"this graph is not lowered, and has no kernel for {request}")


def _no_target(request: KernelRequest) -> str | None:
    return None


def _no_refusals(request: KernelRequest) -> Sequence[tuple[str, str]]:
    return ()


def _no_attention(request: AttentionRequest) -> Attend | str:
    return "this graph is not lowered"


@dataclass(frozen=True)
class Site:
    """A product with stored weights in a graph, until a kernel stands in its place.

    names, weights: qualified name and stored form of each weight; the results of several lie side by side. left: steps
    that were not fused, with the reason.
    """

    names: tuple[str, ...]
    weights: tuple[QuantTensor, ...]
    left: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ChosenKernel:
    """What became of a site: its request, its kernel, and what was not fused, with the reason."""

    names: tuple[str, ...]
    request: KernelRequest
    kernel: Kernel
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        asked = "; ".join(f"{target}: {reason}" for target, reason in self.kernel.refusals)
        left = f"; not fused: {', '.join(self.left)}" if self.left else ""
        why = f" ({asked})" if asked else ""
        return f"{' + '.join(self.names)}: {self.request} -> {self.kernel.target}{why}{left}"


@dataclass
class Context:
    """What passes of one pipeline share.

    kernel: finds the kernel for a request, where the graph is lowered. target: the name of the target that would make
    it; refusals: the targets asked before, and why they refuse. attention: the operator for an attention, or why
    torch's is kept. exact: kernels must not quantize activations on their own account. keeps_stored: weights keep their
    parts besides what kernels hold. quantized: the stored weight behind each get_attr node. kept: the get_attr nodes of
    weights left in float, and why. sites: the products that wait for a kernel. chosen: every site with its kernel, in
    graph order. unused: memory that other graphs may still run on.
    """

    kernel: Callable[[KernelRequest], Kernel] = _no_kernel
    target: Callable[[KernelRequest], str | None] = _no_target
    refusals: Callable[[KernelRequest], Sequence[tuple[str, str]]] = _no_refusals
    attention: Callable[[AttentionRequest], Attend | str] = _no_attention
    exact: bool = False
    keeps_stored: bool = False
    quantized: dict[fx.Node, QuantTensor] = field(default_factory=dict)
    kept: dict[fx.Node, str] = field(default_factory=dict)
    sites: dict[fx.Node, Site] = field(default_factory=dict)
    chosen: list[tuple[Site, ChosenKernel]] = field(default_factory=list)
    unused: list[object] = field(default_factory=list)


class Pass(ABC):
    """One named rewrite of a graph, in place."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Rewrite the graph; return how many places changed. The pipeline lints and recompiles."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    passes: Sequence[Pass]

    def run(self, module: fx.GraphModule, context: Context) -> dict[str, int]:
        """Run every pass on the module in place. Returns the number of changes by pass name."""
        counts = {}
        for step in self.passes:
            counts[step.name] = step.run(module, context)
            module.graph.lint()
            dump(module, step.name)
        module.recompile()
        log.info("passes: %s", ", ".join(f"{name} {changed}" for name, changed in counts.items()))
        return counts


def dump(module: fx.GraphModule, name: str) -> None:
    """Write a graph as text into the folder that PTQC_DUMP names, if it names one."""
    folder = os.environ.get("PTQC_DUMP")
    if folder:
        path = Path(folder) / f"{next(_dump_number):03d}-{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{module.graph}\n", encoding="utf-8")
