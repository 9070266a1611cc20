"""A Llama in plain torch, with random weights and a static cache: for machines that have torch and nothing else."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PlainLlama", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """hidden, intermediate: features. heads: of queries. key_heads: of keys and values. length: of the cache."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    length: int

    @property
    def head(self) -> int:
        """Features of one head."""
        return self.hidden // self.heads


class _Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        narrow = sizes.key_heads * sizes.head
        self.q_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        cache = torch.zeros(1, sizes.key_heads, sizes.length, sizes.head)
        self.register_buffer("keys", cache, persistent=False)
        self.register_buffer("values", cache.clone(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        self.keys.index_copy_(2, positions, _turned(k, cos, sin))
        self.values.index_copy_(2, positions, v)
        times = self.sizes.heads // self.sizes.key_heads
        k, v = (cache.repeat_interleave(times, 1) for cache in (self.keys, self.values))
        y = functional.scaled_dot_product_attention(_turned(q, cos, sin), k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.sizes.head).transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class _Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = (nn.RMSNorm(sizes.hidden, eps=1e-5) for _ in range(2))
        self.attention = _Attention(sizes)
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, x: Tensor, *where: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x), *where)
        y = self.before_mlp(x)
        return x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))


class PlainLlama(nn.Module):
    """(ids [1, tokens], positions [tokens]) -> logits of the last token [1, vocabulary]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, eps=1e-5)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        half = torch.arange(0, self.sizes.head, 2, device=ids.device)
        angle = positions[:, None].float() * 10000.0 ** (-half / self.sizes.head)
        dtype = self.embedding.weight.dtype
        cos, sin = (torch.cat([f(angle)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
        mask = torch.arange(self.sizes.length, device=ids.device) <= positions[:, None]
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, positions, cos, sin, mask)
        return self.head(self.norm(x[:, -1]))
