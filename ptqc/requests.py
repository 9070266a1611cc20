"""What lowering asks of code generation: a request for a kernel, the answer, and what a target must offer.

A kernel computes, for x [rows, in] and a stored matrix S [out, in],

    y = epilogue( A(prologue(x)) @ S.T )

prologue and epilogue are chains of `ptqc.fusions`, A is the quantization of the input (`ActSpec`). Everything behind
the product happens in float32; the result is rounded once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.fusions import narrows, takes_operand
from ptqc.held import Layout
from ptqc.registry import Registry
from ptqc.spec import WeightSpec

__all__ = ["TARGETS", "Emitter", "ExpertCall", "Kernel", "KernelRequest", "KernelSource"]

ExpertCall = Callable[..., Tensor]
"""(x [rows, in], parts of a stack of experts, at, experts, is_sorted, width) -> [rows, width]; see
`ptqc.codegen.experts`."""


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """Everything the text of a kernel may depend on, hence the key under which it is cached.

    n, k: out_features and in_features of the stored matrix. dtype: of the activation and the result. prologue,
    epilogue: names of `ptqc.fusions`, in the order in which they happen. needs_grad: whether a derivative towards the
    activation is wanted. exact: the kernel must not quantize activations on its own account.
    """

    spec: WeightSpec
    n: int
    k: int
    dtype: torch.dtype
    device: str
    act: ActSpec = field(default_factory=ActSpec)
    prologue: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()
    needs_grad: bool = False
    exact: bool = False

    @property
    def width(self) -> int:
        """Features of the result: n, or n / 2 behind a gate."""
        return self.n // 2 if any(map(narrows, self.epilogue)) else self.n

    @property
    def is_plain(self) -> bool:
        """True for a product of an input as it comes, with a bias at most."""
        return not self.prologue and self.act.dtype is None and self.epilogue in ((), ("bias",))

    def __str__(self) -> str:
        """Spec, shape, dtype and the chain: int4g32 [96, 64] bfloat16 cpu: rms_norm:1e-06 > product > bias > silu."""
        act = () if self.act.dtype is None else (str(self.act),)
        chain = " > ".join((*self.prologue, *act, "product", *self.epilogue))
        flags = [name for name in ("needs_grad", "exact") if getattr(self, name)]
        where = " ".join([str(self.dtype).removeprefix("torch."), self.device, *flags])
        return f"{self.spec} [{self.n}, {self.k}] {where}: {chain}"

    @property
    def operands_before(self) -> int:
        """How many operands belong to what happens before the product: the first ones."""
        return sum(map(takes_operand, self.prologue)) + self.act.is_static

    @property
    def operands(self) -> tuple[str, ...]:
        """What each operand of the kernel belongs to, in order: the prologue, a static input scale, the epilogue.

        Matrices and biases have the dtype of the request; gains and scales may be float32; orders are int32, static
        input scales [] float32.
        """
        before = [f"prologue {name}" for name in self.prologue if takes_operand(name)]
        scale = ["act_scale"] if self.act.is_static else []
        return (*before, *scale, *(f"epilogue {name}" for name in self.epilogue if takes_operand(name)))


@dataclass(frozen=True, slots=True)
class KernelSource:
    """The text of a kernel: a Python module that defines

    `LAYOUT: ptqc.held.Layout`, which prepares the stored parts, once, and can give them back, or only
    `prepare(parts: list[Tensor]) -> list[Tensor]`; and
    `run(x: Tensor, parts: list[Tensor], operands: list[Tensor]) -> Tensor`, x being [rows, in], the operands those of
    `KernelRequest.operands` (per row: [rows, width]), the result [rows, width].

    operator: instead of a text, an operator with the signature of `ptqc::linear` that exists already.
    """

    text: str = ""
    operator: str | None = None


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel: the graph calls `call(*arguments(x, parts, operands))`, parts being those of `layout`.

    experts: the same for rows that go to experts, parts being those of `layout.stacked`; None if there is no such call.
    """

    target: str
    call: Callable[..., Tensor]
    layout: Layout
    arguments: Callable[[Any, Sequence[Any], Sequence[Any]], tuple[Any, ...]]
    refusals: tuple[tuple[str, str], ...] = ()
    experts: ExpertCall | None = None

    def __call__(self, x: Tensor, parts: Sequence[Tensor], operands: Sequence[Tensor] = ()) -> Tensor:
        """The product for x [..., in] and the stored parts, prepared on the spot: for tests and trials."""
        return self.call(*self.arguments(x, self.layout.prepare(list(parts)), list(operands)))


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
