"""GPTQ: round the columns of a weight one after the other, later ones making up for the errors of earlier ones.

Frantar, Ashkboos, Hoefler and Alistarh 2022, GPTQ, arXiv:2210.17323. With H the mean of x x' over the inputs x of a
weight W, minimise |(W - Q) x|^2 on average, that is tr((W - Q) H (W - Q)'), over the codes of Q, greedily by column.

Where we differ from the paper, and why:
1. The same codes come from the Cholesky factor of H instead of that of its inverse (`_error_feedback`).
2. Columns of large H_jj are rounded first (act-order) and groups stay the groups of the stored order, their scales
   being chosen beforehand: most of the gain of act-order, and nothing to permute at run time.
3. Scales are those with the least error where a column counts as much as the columns after it cannot make up for
   (`_weighted_scales`); the paper takes the range of the group.
4. Inputs that were always zero keep weights, rounded to nearest: other data than that of calibration may need them.
5. Damping grows where a weight saw fewer rows than it has inputs, as experts of a mixture do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ptqc import storage
from ptqc.errors import SpecError
from ptqc.methods import METHODS, whole_row
from ptqc.passes.methods._error_feedback import Feedback, factor
from ptqc.passes.methods._once import once_for
from ptqc.passes.methods._weighted_scales import ScalePlan, can_search, nearest_levels
from ptqc.spec import WeightSpec, Zero

__all__ = ["Gptq"]

_WEIGHTS_AT_ONCE = 1 << 22
"""Weights of a stack that are rounded together."""


@METHODS.register("gptq")
@dataclass(frozen=True)
class Gptq:
    """GPTQ. symmetric: no zero point; otherwise `zero` says which.

    act_order: "static" rounds columns in the order of their mean square input, within groups of the stored order; True
    forms the groups in that order too, which permutes the inputs at run time; False rounds them as they come.
    damp: added to the diagonal of the Hessian, as a share of its mean; ten times as much where it is not enough.
    search: choose the scales by their error, not by the range of the group.
    """

    symmetric: bool = True
    zero: Literal["int", "float", "min"] = "int"
    act_order: bool | Literal["static"] = "static"
    damp: float = 0.01
    search: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    finds_ranges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.act_order not in (False, True, "static"):
            raise SpecError(f'gptq has no act_order {self.act_order!r}; use False, True or "static"')
        if not 0 <= self.damp < float("inf"):
            raise SpecError(f"gptq adds a share of the Hessian's mean diagonal, such as 0.01, not {self.damp}")

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        """4 bits in groups of 128 unless asked otherwise."""
        zero: Zero = "none" if self.symmetric or bits in (1.5, 1.58, 1.6) else self.zero
        return WeightSpec.integer(4 if bits is None else bits, whole_row(group, 128), zero)

    def refuses(self, spec: WeightSpec) -> str | None:
        """Only lattice codebooks: their weights are not rounded one at a time."""
        if spec.vector == 1:
            return None
        return f"gptq rounds single weights, not the vectors of {spec}; use a spec such as {self.spec()}"

    def choose(self, weight: Tensor, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
        """See `ptqc.methods.Method`. Reads "hessian", and "count" where there is one."""
        *lead, _, columns = weight.shape
        stack = weight.reshape(-1, *weight.shape[-2:])
        hessian = statistics["hessian"].expand(*lead, columns, columns).reshape(-1, columns, columns)
        damp = torch.full((len(stack),), self.damp)
        if "count" in statistics:
            rows = statistics["count"].expand(lead).reshape(-1)
            damp = damp * (columns / rows.clamp_min(1)).clamp_min(1)
        # Nested scales share blocks across the whole stack, so they are chosen together.
        step = len(stack) if spec.scale.bits is not None else max(1, _WEIGHTS_AT_ONCE // stack[0].numel())
        source = statistics["hessian"]
        parts = []
        for number, some in enumerate(zip(stack.split(step), hessian.split(step), damp.split(step), strict=True)):
            weights, own, added = some
            key = (number, step, self.act_order, added.tolist())
            parts.append(self._choose(weights, *once_for(source, key, partial(self._factored, own, added)), spec))
        return _joined(parts, lead)

    def column_importance(self, statistics: Mapping[str, Tensor]) -> Tensor:
        """What is left of the cost of an error once later columns have made up for it, by column: [*lead, in].

        Transforms weigh errors by it instead of by the diagonal of the Hessian, see `ptqc.transforms`.
        """
        hessian = statistics["hessian"]
        *lead, _, columns = hessian.shape
        stack = hessian.reshape(-1, columns, columns)
        order, triangle = self._factored(stack, torch.full((len(stack),), self.damp))
        return _importance(triangle, order).view(*lead, columns)

    def _factored(self, hessian: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
        """The order of rounding [stack, in], and the factor of each Hessian in that order [stack, in, in]."""
        order = self._order(hessian)
        return order, factor(_ordered(hessian, order), damp)

    def _choose(self, weight: Tensor, order: Tensor, triangle: Tensor, spec: WeightSpec) -> storage.Codes:
        """Codes of weights [stack, out, in] with one order and factor each."""
        if self.act_order is not True or spec.groups(weight.shape)[1] == 1:
            return self._round(weight, triangle, order, spec)
        permuted = weight.take_along_dim(order[:, None, :], 2)
        return replace(self._round(permuted, triangle, torch.arange(order.shape[1])[None], spec), order=order)

    def _order(self, hessian: Tensor) -> Tensor:
        """The input that is rounded j-th, [stack, in]."""
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        if self.act_order is False:
            return torch.arange(diagonal.shape[1]).expand_as(diagonal)
        return diagonal.argsort(dim=-1, descending=True, stable=True)

    def _round(self, weight: Tensor, triangle: Tensor, place: Tensor, spec: WeightSpec) -> storage.Codes:
        """Codes of weights [stack, out, in], the column at place[j] being rounded j-th. place: [stack, in]."""
        place = place.expand(len(weight), -1)
        plan = ScalePlan(weight, _importance(triangle, place), spec, self.search)
        is_ahead = self.act_order == "static" or not can_search(spec)
        if is_ahead:
            plan.choose_all()
        feedback = Feedback(
            weight=weight.mT.take_along_dim(place[:, :, None], 1),
            factor=triangle,
            levels=nearest_levels(spec),
            scales=plan.scales,
            group_of=place // plan.group,
            group=plan.group,
            begin=None if is_ahead else plan.choose_one,
        )
        rounded = feedback.run()
        stored = torch.empty_like(rounded).scatter_(1, place[:, :, None].expand_as(rounded), rounded)
        return plan.codes(stored.mT.contiguous())


def _importance(triangle: Tensor, place: Tensor) -> Tensor:
    """What the remaining error of each column costs, [stack, in]. place: the column that each row of a factor is of."""
    return torch.empty_like(triangle[:, 0]).scatter_(1, place, triangle.diagonal(dim1=-2, dim2=-1).square())


def _ordered(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of Hessians [stack, in, in] in the order [stack, in]."""
    pairs = zip(hessian, order, strict=True)
    return torch.stack([one.index_select(0, place).index_select(1, place) for one, place in pairs])


def _joined(parts: list[storage.Codes], lead: list[int]) -> storage.Codes:
    """Parts of a stack as one, its leading axes [lead]."""

    def join(pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces).reshape(*lead, *pieces[0].shape[1:])

    zeros = [part.zero for part in parts if part.zero is not None]
    orders = [part.order for part in parts if part.order is not None]
    return storage.Codes(
        codes=join([part.codes for part in parts]),
        scale=join([part.scale for part in parts]),
        zero=join(zeros) if zeros else None,
        order=join(orders) if orders else None,
    )
