"""QuIP#: vectors of eight weights on the E8 lattice, later ones making up for the errors of earlier ones.

Tseng, Chee, Sun, Kuleshov and De Sa 2024, QuIP#, arXiv:2402.04396. BlockLDLQ (section 4.1): with H the mean of x x'
over the inputs x of a weight W, minimise tr((W - Q) H (W - Q)') greedily, eight columns at a time, over the points of
a lattice codebook (`ptqc.lattice`). Its transform, "hadamard", makes W and H incoherent first; without it, heavy tails
of a weight are cut off.

With H = R R', R upper triangular, and F = R diag(R_kk)^-1 over its 8 x 8 diagonal blocks, the loss is the sum over k
of |(E_k + sum_{i<k} E_i F_ik) R_kk|^2, E = W - Q: block k is rounded at W_k + sum_{i<k} E_i F_ik (the paper's feedback
from the block LDL decomposition).

Where we differ from the paper, and why:
1. The scale of a row is its root mean square over what suits a normal distribution best, times one of a few multiples
   tried with feedback on a sample of the rows: the stronger the inputs correlate, the more feedback widens the weights.
2. Nothing is fine-tuned afterwards (section 5): a method sees one matrix, never the model.
3. 3 and 4 bits are residual codes as in the paper, their units found by search for a normal distribution.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ptqc import grid, storage
from ptqc.errors import SpecError
from ptqc.lattice import Lattice
from ptqc.methods import METHODS, whole_row
from ptqc.passes.methods._error_feedback import factor, inverse_of
from ptqc.passes.methods._once import once_for
from ptqc.spec import WeightSpec

__all__ = ["QuipSharp"]

_CODEBOOKS = {2: "e8p", 3: "e8p3", 4: "e8p4"}
_VECTOR = 8
_LAZY = 128
"""Columns whose errors are fed to the columns after them as one matrix product."""
_SAMPLED_ROWS = 256
_ROWS_AT_ONCE = 1 << 13


@METHODS.register("quip_sharp")
@dataclass(frozen=True)
class QuipSharp:
    """QuIP# without fine-tuning.

    damp: added to the diagonal of the Hessian, as a share of its mean; ten times as much where it is not enough.
    multiples: of the scale that suits a normal distribution; the one with the least loss is taken.
    """

    damp: float = 0.01
    multiples: tuple[float, ...] = (0.95, 1.0, 1.07, 1.15)

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    finds_ranges: ClassVar[bool] = True
    brings: ClassVar[tuple[str, ...]] = ("hadamard",)

    def __post_init__(self) -> None:
        if not 0 <= self.damp < float("inf"):
            raise SpecError(f"quip_sharp adds a share of the Hessian's mean diagonal, such as 0.01, not {self.damp}")
        if not self.multiples or min(self.multiples) <= 0:
            raise SpecError(
                f"quip_sharp tries positive multiples of the scale, such as (0.9, 1.0), not {self.multiples}"
            )

    def spec(self, bits: float | None = None, group: int | None = None) -> WeightSpec:
        """2 bits and one scale for each row unless asked otherwise; also 3 and 4 bits.

        Raises: SpecError for another width, or a group that cuts the vectors of eight.
        """
        width = 2 if bits is None else bits
        if width not in _CODEBOOKS:
            raise SpecError(f"quip_sharp has 2, 3 and 4 bits, not {width:g}; for other widths use gptq or hqq")
        scale_for = whole_row(group, None)
        return WeightSpec.parse(_CODEBOOKS[int(width)] + ("" if scale_for is None else f"g{scale_for}"))

    def refuses(self, spec: WeightSpec) -> str | None:
        """Everything but lattice codebooks with a plain scale for each row, group of a row, or tensor."""
        if spec.vector != _VECTOR:
            return f"quip_sharp chooses points of a lattice, not codes of {spec}; use gptq for it, or {self.spec()}"
        if spec.is_block or spec.scale.bits is not None or spec.scale.dtype in ("e4m3", "e8m0"):
            return f"quip_sharp has float scales for rows, groups and tensors, not those of {spec}; use {self.spec()}"
        return None

    def choose(self, weight: Tensor, spec: WeightSpec, statistics: Mapping[str, Tensor]) -> storage.Codes:
        """See `ptqc.methods.Method`. Reads "hessian"; without it the squared error itself is minimised."""
        *lead, _, columns = weight.shape
        stack = weight.reshape(-1, *weight.shape[-2:])
        hessian = statistics.get("hessian", torch.eye(columns, device=weight.device))
        hessians = hessian.expand(*lead, columns, columns).reshape(-1, columns, columns)
        parts = [
            self._choose(one, once_for(hessian, (number, self.damp), partial(self._factored, own)), spec)
            for number, (one, own) in enumerate(zip(stack, hessians, strict=True))
        ]
        codes, scale = (torch.stack(tensors).unflatten(0, lead) if lead else tensors[0]
                        for tensors in zip(*((part.codes, part.scale) for part in parts), strict=True))  # fmt: skip
        return storage.Codes(codes, scale)

    def _factored(self, hessian: Tensor) -> Tensor:
        return factor(hessian[None], torch.tensor([self.damp]))[0]

    def _choose(self, weight: Tensor, triangle: Tensor, spec: WeightSpec) -> storage.Codes:
        """Codes of one weight [out, in]. triangle: [in, in], the factor of its Hessian."""
        assert spec.book is not None and spec.book.lattice is not None
        feedback = _BlockFeedback(triangle, spec.book.lattice)
        normal = grid.tiles(weight, spec).square().mean(-1).sqrt() / spec.book.lattice.rms
        scales = [storage.round_scale(multiple * normal, spec) for multiple in self.multiples]
        sample = torch.linspace(0, len(weight) - 1, min(_SAMPLED_ROWS, len(weight))).long()
        sampled = torch.cat([_per_vector(scale, weight)[sample] for scale in scales])
        losses = feedback.losses(weight[sample].repeat(len(scales), 1), sampled)
        scale = scales[int(losses.view(len(scales), -1).sum(1).argmin())]
        return storage.Codes(feedback.codes(weight, _per_vector(scale, weight)), scale)


def _per_vector(scale: Tensor, weight: Tensor) -> Tensor:
    """Scales [rows, groups] spread to one for each vector, [out, in // 8]."""
    vectors = weight.shape[1] // _VECTOR
    return scale.repeat_interleave(vectors // scale.shape[1], 1).expand(len(weight), vectors)


@dataclass
class _BlockFeedback:
    """Rounds the rows of weights that share R, the upper triangular factor of their Hessian, [in, in]."""

    factor: Tensor
    lattice: Lattice
    blocks: Tensor = field(init=False)
    """R_kk, [in // 8, 8, 8]."""
    reach: Tensor = field(init=False)
    """F, [in, in]."""

    def __post_init__(self) -> None:
        columns = len(self.factor)
        grid_of_blocks = self.factor.view(columns // _VECTOR, _VECTOR, columns // _VECTOR, _VECTOR)
        self.blocks = grid_of_blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
        by_block = self.factor.view(columns, -1, _VECTOR).transpose(0, 1)
        reach = torch.linalg.solve_triangular(self.blocks, by_block, upper=True, left=False)
        self.reach = reach.transpose(0, 1).reshape(columns, columns)

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Codes [out, in // 8] of a weight [out, in]; scale: [out, in // 8]."""
        rows = zip(weight.split(_ROWS_AT_ONCE), scale.split(_ROWS_AT_ONCE), strict=True)
        return torch.cat([self._round(*some)[0] for some in rows])

    def losses(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Diagonal of E H E' for the codes, [out]."""
        return self._round(weight, scale)[1]

    def _round(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        error, inverse = torch.empty_like(weight), inverse_of(scale)
        codes = torch.empty(scale.shape, dtype=torch.int64, device=weight.device)
        losses = torch.zeros(len(weight), device=weight.device)
        for start in range(0, weight.shape[1], _LAZY):
            end = min(start + _LAZY, weight.shape[1])
            target = torch.addmm(weight[:, start:end], error[:, :start], self.reach[:start, start:end])
            for first in range(start, end, _VECTOR):
                block, here = first // _VECTOR, slice(first, first + _VECTOR)
                owed = error[:, start:first] @ self.reach[start:first, here]
                wanted = target[:, first - start : first - start + _VECTOR] + owed
                codes[:, block], points = self.lattice.nearest(wanted * inverse[:, block, None])
                number = points * scale[:, block, None]
                error[:, here] = weight[:, here] - number
                losses += ((wanted - number) @ self.blocks[block]).square().sum(1)
        return codes, losses
