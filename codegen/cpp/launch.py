"""One call of a compiled kernel: memory for the result, addresses, threads."""

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ptqc.codegen.cpp.source import KINDS
from ptqc.codegen.cpp.toolchain import compile_library

__all__ = ["Launch"]

_OTHER_KINDS = {torch.float64: torch.float32, torch.int64: torch.int32}
_WORTH_A_THREAD = 1 << 19
"""Products: what takes one thread as long as waking another."""


class Launch:
    """Calls `run` of a text (see `source`): x [..., k] -> [..., width].

    sizes: n, k, group, groups, blocks, padded inputs, padded columns. item_bytes: of the activation in the kernel.
    """

    takes_any_shape: ClassVar[bool] = True

    def __init__(
        self, text: str, flags: Sequence[str], sizes: Sequence[int], width: int, item_bytes: int, row_bytes: int
    ) -> None:
        self._library = compile_library(text, flags)
        scratch = 2 * (sizes[1] + 64)  # a row of floats, and another for what is taken in another order
        self._sizes = (ctypes.c_long * 8)(*sizes, scratch)
        self._width, self._products = width, sizes[0] * sizes[1]
        self._row_bytes = sizes[5] * item_bytes + sizes[4] * row_bytes
        self._thread_bytes = 4 * scratch

    def __call__(self, x: Tensor, parts: Sequence[Tensor], operands: Sequence[Tensor]) -> Tensor:
        """The product, in the dtype of x."""
        *lead, _ = x.shape
        rows = math.prod(lead)
        result = torch.empty(*lead, self._width, dtype=x.dtype)
        if rows == 0:
            return result
        x = x.contiguous()
        threads = max(1, min(torch.get_num_threads(), rows * self._products // _WORTH_A_THREAD))
        work = torch.empty(rows * self._row_bytes + threads * self._thread_bytes, dtype=torch.uint8)
        held = [_readable(operand) for operand in operands]
        pairs = [value for operand in held for value in (operand.data_ptr(), KINDS[operand.dtype])]
        self._run(
            x.data_ptr(), result.data_ptr(), work.data_ptr(), *[part.data_ptr() for part in parts],
            (ctypes.c_long * len(pairs))(*pairs), self._sizes, rows, threads,
        )  # fmt: skip
        return result

    @cached_property
    def _run(self) -> Callable[..., None]:
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 9, *[ctypes.c_long] * 2)
        return prototype(("run", self._library.result()))


def _readable(operand: Tensor) -> Tensor:
    """An operand as the kernel reads it: dense, of a type that it knows."""
    if operand.dtype in KINDS and operand.is_contiguous():
        return operand
    return operand.to(_OTHER_KINDS.get(operand.dtype, operand.dtype)).contiguous()
