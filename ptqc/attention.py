"""What lowering asks of code generation for attention with few queries, and what it gets.

An operator `(q, k, v, mask, scale) -> y` of

    q     [batch, heads, queries, features]
    k     [batch, heads / shared, keys, features]           each head of keys serves `shared` consecutive ones of q
    v     [batch, heads / shared, keys, value features]
    mask  broadcast to [batch, heads, queries, keys]: True where a key is seen, or what is added to the scores; or none
    y     [batch, heads, queries, value features], softmax(scale * q @ k.T + mask) @ v computed in float32

A query that sees no key gets zeros, as from `torch.nn.functional.scaled_dot_product_attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["MOST_QUERIES", "Attend", "AttentionKernel", "AttentionRequest", "empty_result"]

Attend = Callable[..., Tensor]

MOST_QUERIES = 8
"""Beyond these, keys are used often enough for a matrix product to be the better form."""


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """Everything the text of the kernel depends on. mask: its dtype, None without one."""

    dtype: torch.dtype
    head_features: int
    value_features: int
    mask: torch.dtype | None
    device: str


class AttentionKernel(Protocol):
    """What a target makes of a request; text: of the kernel, which names the operator."""

    @property
    def text(self) -> str:
        """The kernel."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Run it; y as `empty_result`."""


def empty_result(q: Tensor, value_features: int) -> Tensor:
    """[batch, heads, queries, value features], in memory by query, then head: what the next product reads."""
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, value_features).transpose(1, 2)
