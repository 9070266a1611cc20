"""Checks of folds: the model before and after, in float64.

Every operator runs in float64, casts to float32 inside the model included, by a dispatch mode below PyTorch: the same
for a captured graph and for a model run eagerly, so that a check also covers what capture did not see. A correct fold
agrees to 1e-9 and better; a wrong one is off by the order of the scale. An operator that has no float64 kernel runs in
float32, and what can be reached is then about 1e-6.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ptqc.groups import ScaledParameter, ScaleGroup, rescaled
from ptqc.program import Program

__all__ = ["Float64", "check_fold", "float64_outputs", "folded", "model_check", "verify"]

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Float64(TorchDispatchMode):
    """Runs every operator in float64. as_is: names of operators that could not be, and ran in their own type."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.as_is: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide_args, wide_kwargs = pytree.tree_map(widened, (args, kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default and wide_args[0].ndim == 2 and wide_args[1].ndim == 3:
            return _grouped(*wide_args, **wide_kwargs)
        try:
            return func(*wide_args, **wide_kwargs)
        except (RuntimeError, NotImplementedError):
            self.as_is.add(str(func))
            narrow = pytree.tree_map(_narrowed, (args, kwargs or {}))
            return pytree.tree_map(widened, func(*narrow[0], **narrow[1]))


def _grouped(x: Tensor, weight: Tensor, offs: Tensor, bias: None = None, out_dtype: None = None) -> Tensor:
    """Rows of x [rows, in], in groups that end at `offs`, each times its matrix of weight [groups, in, out]."""
    ends = [0, *offs.tolist()]
    parts = [x[start:end] @ matrix for start, end, matrix in zip(ends, ends[1:], weight, strict=False)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], weight.shape[-1])])


def widened(value: Any) -> Any:
    """A value in float64 if it is a tensor of a narrower type, or float64 for such a type; anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.double()
    return value


def _narrowed(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def float64_outputs(
    program: Program, batch: Mapping[str, Tensor], values: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Outputs of a graph run in float64. values: other tensors for parameters, by name.

    Raises KeyError if the graph takes values of an earlier one (use `verify`).
    """
    wide = [widened(argument) for argument in program.arguments(batch, values)]
    with torch.no_grad(), Float64():
        found = program.module(*wide)
    return [value for value in pytree.tree_leaves(found) if isinstance(value, Tensor)]


def folded(parameters: Mapping[str, Tensor], group: ScaleGroup, scale: Tensor) -> dict[str, Tensor]:
    """The parameters that a fold changes, in float64, by name. parameters: current values. scale: [channels]."""
    entries: Sequence[ScaledParameter] = (*group.producer, *group.consumers)
    changed: dict[str, Tensor] = {}
    for entry in entries:
        now = changed.get(entry.name, parameters[entry.name]).detach().double()
        changed[entry.name] = rescaled(now, entry, scale)
    return changed


def check_fold(program: Program, batch: Mapping[str, Tensor], group: ScaleGroup, scale: Tensor) -> float:
    """The largest relative change of the outputs of a graph when a group is scaled. scale: [channels], positive."""
    parameters = {program.names[node]: value for node, value in program.parameters.items()}
    before = float64_outputs(program, batch)
    after = float64_outputs(program, batch, folded(parameters, group, scale))
    return change(before, after)


def verify(
    model: nn.Module, batch: Mapping[str, Any], groups: Sequence[ScaleGroup], scales: Sequence[Tensor]
) -> list[float]:
    """The largest relative change of the outputs of the model run eagerly, for each group folded on its own.

    The model is not changed; a copy of its parameters in float64 is made. It needs no graph: what dynamo did not
    capture is covered too.
    """
    run = eager_outputs(model, batch)
    parameters = dict(model.named_parameters())
    before = run({})
    return [change(before, run(folded(parameters, group, scale))) for group, scale in zip(groups, scales, strict=True)]


def model_check(
    model: nn.Module, programs: Sequence[Program], batch: Mapping[str, Any]
) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]:
    """A function that says how much the outputs change, relatively, between two sets of values of parameters.

    Both sets give parameters by name; the others are the model's. A model that is one whole graph is run as that graph,
    others eagerly.
    """
    is_whole = len(programs) == 1 and not programs[0].unknown

    def check(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
        if is_whole:
            one, other = (float64_outputs(programs[0], batch, values) for values in (before, after))
        else:
            run = eager_outputs(model, batch)
            one, other = run(before), run(after)
        return change(one, other)

    return check


def eager_outputs(model: nn.Module, batch: Mapping[str, Any]) -> Callable[[Mapping[str, Tensor]], list[Tensor]]:
    """The model as a function of other values for some parameters, everything in float64."""
    own = {name: widened(value.detach()) for name, value in model.named_parameters()}
    own |= {name: widened(value) for name, value in model.named_buffers()}
    inputs = pytree.tree_map(widened, dict(batch))

    def run(values: Mapping[str, Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad(), Float64():
            return list(_tensors(functional_call(model, {**own, **values}, (), inputs)))

    return run


def _tensors(found: Any) -> Iterator[Tensor]:
    """Floating-point tensors in anything a model returns."""
    if isinstance(found, Tensor):
        if found.is_floating_point():
            yield found.double()
    elif isinstance(found, Mapping):
        for value in found.values():
            yield from _tensors(value)
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from _tensors(value)


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest of the relative changes, max |a - b| over max |a|; infinite if something became NaN."""
    worst = 0.0
    for one, other in zip(before, after, strict=True):
        finite = torch.isfinite(one)
        if not one.numel() or not bool(finite.any()):
            continue
        if not torch.equal(finite, torch.isfinite(other)):
            return float("inf")
        size = float(one[finite].abs().max())
        worst = max(worst, float((one[finite] - other[finite]).abs().max()) / (size or 1.0))
    return worst
