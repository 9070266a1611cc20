"""Clipping: narrower ranges for groups of weights where that lowers the output error.

With E = Q(clip(W)) - W and H = mean(x xT), every row of a weight adds e H eT to the error of the output. Groups of
columns are visited from left to right, all rows at once; a group takes the range that lowers this sum most while the
errors of the other groups stay as they are,

    e_g H_gg e_gT + 2 e_g c_g,    c_g = (e H)_g - e_g H_gg.

AWQ (arXiv:2306.00978) has the first term alone. With the second, no step raises the error of the whole row.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ptqc.passes.transforms._scale_search import rounded
from ptqc.spec import WeightSpec

__all__ = ["clipped"]


def clipped(weight: Tensor, hessian: Tensor, spec: WeightSpec, shares: Sequence[float]) -> Tensor:
    """A weight [out, in] with its groups clipped. hessian: [in, in]. shares: of the range of a group, to be tried."""
    group, alone = spec.group or weight.shape[1], replace(spec, group=None)
    result, error = weight.clone(), rounded(weight, spec) - weight
    for first in range(0, weight.shape[1], group):
        here = slice(first, first + group)
        block, moment, original = hessian[here, here], hessian[:, here], weight[:, here]
        others = 2 * (error @ moment - error[:, here] @ block)
        best, best_error = result[:, here], error[:, here]
        least = _added(best_error, block, others)
        high, low = original.amax(-1, keepdim=True), original.amin(-1, keepdim=True)
        for share in shares:
            trial = original.clamp(low * share, high * share)
            trial_error = rounded(trial, alone) - original
            added = _added(trial_error, block, others)
            is_better = (added < least).unsqueeze(-1)
            best, best_error = torch.where(is_better, trial, best), torch.where(is_better, trial_error, best_error)
            least = torch.minimum(added, least)
        result[:, here], error[:, here] = best, best_error
    return result


def _added(error: Tensor, block: Tensor, others: Tensor) -> Tensor:
    """What the error of a group adds to that of each row, [rows]."""
    added: Tensor = torch.linalg.vecdot(torch.addmm(others, error, block), error)
    return added
