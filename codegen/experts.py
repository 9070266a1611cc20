"""The kernel of one expert for every expert that has rows.

Experts lie one below the other in a prepared weight (`ptqc.held.Layout.stacked`), so that the parts of each are views.
"""

from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ptqc.held import Layout

__all__ = ["expert_runner"]

Run = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]


def expert_runner(run: Run, layout: Layout, n: int) -> Callable[..., Tensor]:
    """From the kernel of a matrix [n, in] to `(x, parts, at, experts, is_sorted, width) -> y`.

    x: [rows, in]; parts: of all experts. at: where the rows of each expert end [experts], for sorted rows, or the
    expert of each row [rows]. Rows behind the last end are zeros. y: [rows, width].
    """

    pieces: MutableMapping[Tensor, dict[int, Sequence[Tensor]]] = WeakIdKeyDictionary()

    def piece_of(parts: Sequence[Tensor], expert: int, experts: int) -> Sequence[Tensor]:
        """The parts of one expert, which are views: made once, as they cost a fifth of a small product."""
        known = pieces.setdefault(parts[0], {})
        if expert not in known:
            whole = layout.stacked(experts)
            piece = None if whole is None else whole.cut(parts, expert * n, layout)
            assert piece is not None
            known[expert] = [part.view_as(part) for part in piece]  # never the key itself, which would live on
        return known[expert]

    def run_experts(
        x: Tensor, parts: Sequence[Tensor], at: Tensor, experts: int, is_sorted: bool, width: int
    ) -> Tensor:
        made, numbers = x.new_zeros(x.shape[0], width), at.tolist()

        def one(expert: int, rows: Tensor) -> Tensor:
            return run(rows, piece_of(parts, expert, experts), ())

        if is_sorted:
            start = 0
            for expert, end in enumerate(numbers):
                if end > start:
                    made[start:end] = one(expert, x[start:end])
                    start = end
            return made
        rows_of: dict[int, list[int]] = {}
        for row, expert in enumerate(numbers):
            rows_of.setdefault(expert % experts, []).append(row)
        for expert, rows in rows_of.items():
            if len(rows) == 1:
                made[rows[0]] = one(expert, x[rows[0] : rows[0] + 1])[0]
            else:
                index = torch.tensor(rows)
                made[index] = one(expert, x[index])
        return made

    return run_experts
