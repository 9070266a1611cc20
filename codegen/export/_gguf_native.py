"""Encoders compiled for this machine: the bytes of the NumPy ones of `_gguf_blocks`, ten to a hundred times faster.

One library for each type, with and without importance, is compiled in the background when the first large weight asks
for it, in two seconds; very large weights wait for it. Until then, for small ones, and without a compiler NumPy serves.
"""

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ptqc.codegen.cpp.isa import Isa, running_isa
from ptqc.codegen.cpp.toolchain import Library, compile_library, compiler, missing_tools
from ptqc.codegen.export._gguf_blocks import TYPES, BlockType
from ptqc.codegen.export._gguf_cpp import FLAGS, encoder_source

__all__ = ["NativeEncoder", "native_encoder"]

log = logging.getLogger("ptqc")

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class NativeEncoder:
    """Encodes rows of one type."""

    def __init__(self, kind: BlockType, library: "Future[Library]") -> None:
        self._kind, self._library = kind, library

    @property
    def is_ready(self) -> bool:
        """Whether it is compiled, and can be."""
        if not self._library.done():
            return False
        error = self._library.exception()
        if error is not None:
            _report(str(error))
        return error is None

    def wait(self) -> None:
        """Return when the compiler is done."""
        wait([self._library])

    def encode(self, rows: Floats, importance: Floats | None, out: Bytes) -> bool:
        """rows: [rows, columns], each row dense. importance: [columns], positive. out: [rows, bytes], dense.

        Returns False if a number is not finite, or above what the type takes; `out` means nothing then.
        """
        kind, columns = self._kind, rows.shape[1]
        assert rows.flags.c_contiguous and out.flags.c_contiguous
        counts = rows if importance is None else np.ascontiguousarray(importance)
        blocks, per_row = rows.size // kind.weights, columns // kind.weights
        return bool(self._encode(rows.ctypes.data, counts.ctypes.data, out.ctypes.data, blocks, per_row))

    @property
    def _encode(self) -> Callable[..., int]:
        prototype = ctypes.CFUNCTYPE(ctypes.c_long, *[ctypes.c_void_p] * 3, *[ctypes.c_long] * 2)
        return prototype(("encode", self._library.result()))


@cache
def native_encoder(name: str, is_weighted: bool) -> NativeEncoder | None:
    """The encoder of a type, which may still have to be compiled; None if there is none.

    is_weighted: whether there is an importance.
    """
    kind, isa = TYPES[name], running_isa()
    if kind.layout is None or not isinstance(isa, Isa) or missing_tools(compiler(), isa) is not None:
        return None
    return NativeEncoder(kind, compile_library(encoder_source(kind, is_weighted, isa), (*isa.flags, *FLAGS)))


@cache
def _report(error: str) -> None:
    """Said once."""
    log.warning("GGUF types are encoded by NumPy, ten times slower or more: %s", error)
