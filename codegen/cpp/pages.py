"""Memory in large pages: weights are read from end to end, and every page that begins costs a look into its table."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["in_large_pages"]

_PAGE = 1 << 21
_ADVICE = 14
"""MADV_HUGEPAGE of Linux."""


def in_large_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor for which Linux is asked to use pages of 2 MB; a plain one where there are none to be had."""
    tensor = torch.empty(*shape, dtype=dtype)
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    advise = _advise()
    if advise is not None and end > start:
        advise(start, end - start, _ADVICE)
    return tensor


@cache
def _advise() -> Any:
    """`madvise` of the C library, None where it has no such function."""
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
