"""What lowering asks of code generation: a request for a kernel, the answer, and what a target must offer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.registry import Registry
from ptqc.spec import WeightSpec

__all__ = ["TARGETS", "Emitter", "Kernel", "KernelRequest", "KernelSource"]


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """Everything the text of a kernel may depend on, hence the key under which it is cached.

    n, k: out_features and in_features. dtype: of the activation and the result. needs_grad: whether a derivative
    towards the activation is wanted.
    """

    spec: WeightSpec
    n: int
    k: int
    dtype: torch.dtype
    device: str
    act: ActSpec = field(default_factory=ActSpec)
    epilogue: tuple[str, ...] = ()
    needs_grad: bool = False


@dataclass(frozen=True, slots=True)
class KernelSource:
    """The text of a kernel: a Python module that defines

    `prepare(parts: list[Tensor]) -> list[Tensor]`, run once on the stored parts, and
    `run(x: Tensor, parts: list[Tensor], bias: Tensor | None) -> Tensor`, x being [rows, in].

    operator: instead of a text, an operator with the signature of `ptqc::linear` that exists already.
    """

    text: str = ""
    operator: str | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel: `call` is what the graph calls, on (x, parts, *arguments, bias)."""

    target: str
    call: Callable[..., Tensor]
    prepare: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    arguments: tuple[Any, ...] = ()
    refusals: tuple[tuple[str, str], ...] = ()


class Emitter(Protocol):
    """A target: turns requests into text. `emit` is pure: the same request gives the same text."""

    rank: ClassVar[int]
    """Targets are asked in ascending rank; the reference has the highest."""

    def refuses(self, request: KernelRequest) -> str | None:
        """None, or the reason why this target cannot serve the request, shown to the user on fallback."""
        ...

    def emit(self, request: KernelRequest) -> KernelSource:
        """The source of the kernel."""
        ...


TARGETS: Registry[type[Emitter]] = Registry("target", "ptqc.codegen.targets")
