"""llama.cpp's own quantizer, called through the shared libraries of the package llama-cpp-python."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from ptqc.codegen.export._gguf_blocks import TYPES

__all__ = ["encode"]

Floats = NDArray[np.float32]


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


_GGML = _library()


def encode(weights: Floats, name: str, importance: Floats | None = None) -> NDArray[np.uint8]:
    """Bytes of weights [rows, columns]: rows are spread over the cores, as llama-quantize does it."""
    kind = TYPES[name]
    rows, columns = weights.shape
    out = np.empty((rows, columns // kind.weights * kind.nbytes), np.uint8)
    counts = None if importance is None else importance.ctypes.data
    number, threads = int(GGMLQuantizationType[name]), os.cpu_count() or 1

    def some(part: int) -> None:
        start, stop = part * rows // threads, (part + 1) * rows // threads
        _GGML.ggml_quantize_chunk(
            number, weights.ctypes.data, out.ctypes.data, start * columns, stop - start, columns, counts
        )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(threads)))
    return out
