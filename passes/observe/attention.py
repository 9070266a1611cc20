"""Observe the output projection inside the attention of torch, which graphs of torch functions hold as one node.

The function is called as before, and the matrix product that reads the projection is recognised, while it runs, by
the storage of its operand.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptqc.passes.observe.layout import Layout
from ptqc.passes.observe.recorder import Recorder
from ptqc.views import function_name

__all__ = ["OUTPUT_WEIGHT", "ObservedAttention", "is_attention"]

OUTPUT_WEIGHT = 11
"""Position of the output projection among the arguments of `multi_head_attention_forward`."""

# The operands (input, weight) of the products that a linear becomes.
_PRODUCTS = {
    torch.ops.aten.linear.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.mm.default: (0, 1),
}


def is_attention(node: fx.Node) -> bool:
    """Whether a node is a whole attention whose output projection is inside."""
    return function_name(node) == "multi_head_attention_forward" and len(node.args) > OUTPUT_WEIGHT


class ObservedAttention(nn.Module):
    """`torch.nn.functional.multi_head_attention_forward`, handing the recorder what its output projection reads."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Arguments are those of the function."""
        with _Watch(self.recorder, arguments[OUTPUT_WEIGHT]):
            return nn.functional.multi_head_attention_forward(*arguments, **named)


class _Watch(TorchDispatchMode):
    def __init__(self, recorder: Recorder, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder, self.weight = recorder, weight

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = _PRODUCTS.get(func)
        if places is not None and self._is_weight(args[places[1]]):
            x: Tensor = args[places[0]]
            self.recorder.take(x[None], [self.weight], Layout())  # an axis more: its rows are not in a mask's order
        return func(*args, **(kwargs or {}))

    def _is_weight(self, operand: Tensor) -> bool:
        mine, its = self.weight, operand
        return mine.numel() == its.numel() and mine.untyped_storage().data_ptr() == its.untyped_storage().data_ptr()
