"""Attention in Triton: refusals, tiles, strides, runs."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ptqc.attention import AttentionKernel, AttentionRequest, empty_result
from ptqc.codegen.build import load_text
from ptqc.codegen.gpu.attention import LOG2_E, attention_text, padded_features
from ptqc.codegen.gpu.launch import device_modes, on_device, reserve_workspace, workspace
from ptqc.codegen.gpu.module import ACTIVATION_TYPES, no_triton
from ptqc.codegen.gpu.tiles import device_facts, split_of

__all__ = ["AttentionTile", "attend_in_triton", "attention_tile"]

MOST_FEATURES = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
"""Of a head: beyond them a tile leaves the registers."""
MOST_RUNS = 64
"""One program joins them all."""
_STEP_BYTES = 32 * 1024
"""Keys and values of one step; the next is on its way to shared memory."""


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """rows: queries of all heads that share keys; keys: of one step; warps, stages: as Triton takes them."""

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


def attention_tile(request: AttentionRequest, rows: int) -> AttentionTile:
    """The tile for so many rows."""
    is_wide = request.dtype == torch.float32  # taken apart in registers, for tensor cores
    a_key = sum(padded_features(request)) * (8 if is_wide else 2)
    keys = max(16, min(64, 1 << (_STEP_BYTES // a_key).bit_length() - 1))
    tall = 16 if rows <= 16 or is_wide else 32 if rows <= 32 else 64
    return AttentionTile(tall, keys, 4 if tall == 16 else 8)


def attend_in_triton(request: AttentionRequest) -> AttentionKernel | str:
    """What runs the request, or why nothing does."""
    reason = no_triton(request.device)
    if reason is not None:
        return reason
    if request.dtype not in ACTIVATION_TYPES or request.mask not in (None, torch.bool, *ACTIVATION_TYPES):
        return "attention in Triton takes float16, bfloat16 and float32"
    if request.dtype == torch.float32 and torch.version.hip is not None:
        return "attention in Triton takes no float32 on AMD's GPUs: it needs three products of tf32"
    most = MOST_FEATURES[request.dtype]
    if max(request.head_features, request.value_features) > most:
        return f"attention in Triton takes heads of at most {most} features in {request.dtype}"
    return _Launch(request, attention_text(request))


@dataclass(frozen=True)
class _Launch:
    """One call of the kernel."""

    request: AttentionRequest
    text: str

    @cached_property
    def _kernel(self) -> Any:
        return load_text(self.text).attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, heads, queries, _ = q.shape
        key_heads, keys = k.shape[1], k.shape[2]
        result = empty_result(q, self.request.value_features)
        if result.numel() == 0 or keys == 0:
            return result.zero_()
        q, k, v = (value if value.stride(-1) == 1 else value.contiguous() for value in (q, k, v))
        seen = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()
        shared = heads // key_heads
        tile = attention_tile(self.request, shared * queries)
        tiles = batch * key_heads * -(-shared * queries // tile.rows)
        with on_device(q.device):
            reserve_workspace(q.device)
            partial, counters = workspace(q.device)
            runs = self._runs(tiles, tile, keys, partial, counters)
            self._kernel[tiles, runs](
                q, k, v, _pointer(q, mask), result, partial, counters, scale * LOG2_E,
                key_heads, shared, queries, keys, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *seen, runs,
                BM=tile.rows, BN=tile.keys, RUNS=MOST_RUNS, IS_SPLIT=runs > 1,
                EMULATED=device_modes(q.device)["EMULATED"], num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        return result

    def _runs(self, tiles: int, tile: AttentionTile, keys: int, partial: Tensor, counters: Tensor) -> int:
        """Runs for every tile: from the length of the cache alone, which a captured graph does not change."""
        runs, _ = split_of(tiles, -(-keys // tile.keys), device_facts(partial.device), tile.warps)
        runs = min(runs, MOST_RUNS)
        numbers = tiles * runs * tile.rows * (padded_features(self.request)[1] + 2)
        return 1 if numbers > partial.numel() or tiles > counters.numel() else runs


def _pointer(q: Tensor, mask: Tensor | None) -> Tensor:
    """What stands for a mask: Triton knows no single bits, and does not read the mask that is not there."""
    if mask is None:
        return q
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask
