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

from ptqc.errors import PtqcError
from ptqc.qtensor import QuantTensor
from ptqc.requests import Kernel, KernelRequest

__all__ = ["Context", "Pass", "Pipeline", "dump"]

log = logging.getLogger("ptqc")
_dump_number = count()


def _no_kernel(request: KernelRequest) -> Kernel:
    raise PtqcError(f"this graph is not lowered, and has no kernel for {request}")


@dataclass
class Context:
    """What passes of one pipeline share.

    kernel: finds the kernel for a request, where the graph is lowered. quantized: the stored weight behind each
    get_attr node. kept: the get_attr nodes of weights left in float, and why. chosen: per lowered site its name and
    kernel, with the reasons of the targets that refused.
    """

    kernel: Callable[[KernelRequest], Kernel] = _no_kernel
    quantized: dict[fx.Node, QuantTensor] = field(default_factory=dict)
    kept: dict[fx.Node, str] = field(default_factory=dict)
    chosen: list[tuple[str, Kernel]] = field(default_factory=list)


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
            module.recompile()
            dump(module, step.name)
        log.info("passes: %s", ", ".join(f"{name} {changed}" for name, changed in counts.items()))
        return counts


def dump(module: fx.GraphModule, name: str) -> None:
    """Write a graph as text into the folder that PTQC_DUMP names, if it names one."""
    folder = os.environ.get("PTQC_DUMP")
    if folder:
        path = Path(folder) / f"{next(_dump_number):03d}-{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{module.graph}\n", encoding="utf-8")
