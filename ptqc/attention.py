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

import torch

__all__ = ["MOST_QUERIES", "Attend", "AttentionRequest"]

Attend = Callable[..., torch.Tensor]

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
