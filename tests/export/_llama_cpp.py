"""llama.cpp's own quantizer, through the shared libraries of the package llama-cpp-python."""

import ctypes
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType

from ptqc.codegen.export._gguf_blocks import TYPES


@cache
def ggml():
    """libggml-base."""
    package = pytest.importorskip("llama_cpp")
    library = ctypes.CDLL(str(Path(package.__file__).parent / "lib" / "libggml-base.so"))
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def encode(weights, name, importance=None):
    """Bytes of weights [rows, columns] as llama.cpp encodes them; with importance [columns] as from an imatrix."""
    kind, library = TYPES[name], ggml()
    out = np.empty((len(weights), weights.shape[1] // kind.weights * kind.nbytes), np.uint8)
    counts = None if importance is None else importance.ctypes.data
    number = int(GGMLQuantizationType[name])
    library.ggml_quantize_chunk(number, weights.ctypes.data, out.ctypes.data, 0, *weights.shape, counts)
    return out


def quantize_file(source, target, file_type: LlamaFileType, threads=2, is_pure=False):
    """What llama-quantize does to a file."""
    llama_cpp = pytest.importorskip("llama_cpp")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.pure = int(file_type), threads, is_pure
    silence(llama_cpp)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) == 0


@cache
def silence(llama_cpp):
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback  # kept alive by the cache


def types_in(path):
    """Type of each tensor by name."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
