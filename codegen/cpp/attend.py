"""Attention in C++: refusals, memory, strides, threads."""

import ctypes
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ptqc.attention import AttentionKernel, AttentionRequest, empty_result
from ptqc.codegen.cpp.attention import SIZES, attention_source
from ptqc.codegen.cpp.isa import Isa, running_isa
from ptqc.codegen.cpp.toolchain import compile_library, compiler, missing_tools

__all__ = ["attend_in_cpp"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 512
"""Keys of a piece, at least."""
_WORTH_A_THREAD = 1 << 17
"""Products: what takes one thread as long as waking another."""


def attend_in_cpp(request: AttentionRequest) -> AttentionKernel | str:
    """What runs the request, or why nothing does."""
    isa = running_isa()
    if request.device != "cpu" or request.dtype not in _DTYPES or request.mask not in (None, torch.bool, *_DTYPES):
        return "attention in C++ takes float32, bfloat16 and float16 on the CPU"
    reason = isa if isinstance(isa, str) else missing_tools(compiler(), isa)
    if reason is not None:
        return reason
    assert isinstance(isa, Isa)
    if request.head_features % isa.lanes or request.value_features % isa.lanes:
        return f"attention in C++ takes heads of a multiple of {isa.lanes} features"
    return _Launch(attention_source(request, isa), isa, request.value_features)


class _Launch:
    """One call of the compiled kernel."""

    def __init__(self, text: str, isa: Isa, value_features: int) -> None:
        self.text = text
        self._library = compile_library(text, isa.flags)
        self._value_features = value_features

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, heads, queries, features = q.shape
        key_heads, keys = k.shape[1], k.shape[2]
        result = empty_result(q, self._value_features)
        if result.numel() == 0:
            return result
        q, k, v = (value if value.stride(-1) == 1 else value.contiguous() for value in (q, k, v))
        seen = (0, 0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()
        pieces = max(1, min(keys // _PIECE, -(-16 // (batch * key_heads))))
        rows = batch * heads * queries
        work = torch.empty(rows * pieces * (self._value_features + 2), dtype=torch.float32)
        sizes = (ctypes.c_long * len(SIZES))(
            batch, key_heads, heads // key_heads, queries, keys, pieces,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *seen,
        )  # fmt: skip
        wanted = rows * keys * (features + self._value_features) // _WORTH_A_THREAD
        threads = max(1, min(torch.get_num_threads(), wanted))
        self._run(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), None if mask is None else mask.data_ptr(), result.data_ptr(),
            work.data_ptr(), sizes, scale, threads,
        )  # fmt: skip
        return result

    @cached_property
    def _run(self) -> Callable[..., None]:
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 7, ctypes.c_float, ctypes.c_long)
        return prototype(("run", self._library.result()))
