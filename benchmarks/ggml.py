"""Products of llama.cpp, called through ggml's shared libraries (those that llama-cpp-python installs).

Weights go into the buffer type in which llama.cpp keeps them for this CPU (interleaved rows), as when it loads a model.
"""

import ctypes
import importlib.util
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TYPES = {"Q4_0": (2, 32, 18), "Q4_K": (12, 256, 144), "Q8_0": (8, 32, 34)}
"""Number of the type, weights and bytes of a block."""


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_SIGNATURES = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
}


class Ggml:
    """The libraries and one CPU backend."""

    def __init__(self, folder):
        folder = Path(folder)
        self.libraries = [
            ctypes.CDLL(str(next(folder.glob(f"{name}.so*"))), mode=ctypes.RTLD_GLOBAL)
            for name in ("libggml-base", "libggml-cpu", "libggml")
        ]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(library, name) for library in self.libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        self.weight_buffer = self._interleaved() or self.backend_cpu_buffer_type()

    @staticmethod
    def find(folder=None):
        """The libraries in a folder, or those of llama-cpp-python; None if there are none."""
        if folder is None:
            package = importlib.util.find_spec("llama_cpp")
            folder = Path(package.origin).parent / "lib" if package else None
        return Ggml(folder) if folder and list(Path(folder).glob("libggml-cpu.so*")) else None

    def _interleaved(self):
        """The first extra buffer type of the CPU whose name says that it repacks."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
        name_of = next(lib.ggml_backend_buft_name for lib in self.libraries if hasattr(lib, "ggml_backend_buft_name"))
        name_of.restype, name_of.argtypes = c_char_p, [c_void_p]
        index = 0
        while extra and extra[index]:
            if b"REPACK" in self.backend_buft_name(extra[index]).upper():
                return extra[index]
            index += 1
        return None

    def product(self, kind, weight, rows):
        """A Product with weight [n, k] float32, quantized to `kind`, and `rows` rows of activation."""
        return Product(self, kind, weight, rows)


class Product:
    """y [rows, n] = x [rows, k] @ W.T."""

    def __init__(self, ggml, kind, weight, rows):
        self.ggml, (n, k) = ggml, weight.shape
        number, block, size = TYPES[kind]
        params = _InitParams(1 << 20, None, True)
        weights, rest = ggml.init(params), ggml.init(params)
        w = ggml.new_tensor_2d(weights, number, k, n)
        self.x = ggml.new_tensor_2d(rest, 0, k, rows)
        self.y = ggml.mul_mat(rest, w, self.x)
        self.graph = ggml.new_graph(rest)
        ggml.build_forward_expand(self.graph, self.y)
        ggml.backend_alloc_ctx_tensors_from_buft(weights, ggml.weight_buffer)
        ggml.backend_alloc_ctx_tensors_from_buft(rest, ggml.backend_cpu_buffer_type())
        self.nbytes = n * k // block * size
        packed = np.empty(self.nbytes, dtype=np.uint8)
        floats = np.ascontiguousarray(weight, dtype=np.float32)
        ggml.quantize_chunk(number, floats.ctypes.data, packed.ctypes.data, 0, n, k, None)
        ggml.backend_tensor_set(w, packed.ctypes.data, 0, self.nbytes)
        self.result = np.empty((rows, n), dtype=np.float32)

    def set(self, x):
        """Give the activation, [rows, k] float32."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        self.ggml.backend_tensor_set(self.x, x.ctypes.data, 0, x.nbytes)

    def run(self, threads):
        """Compute once."""
        self.ggml.backend_cpu_set_n_threads(self.ggml.backend, threads)
        self.ggml.backend_graph_compute(self.ggml.backend, self.graph)

    def get(self):
        """The result, [rows, n] float32."""
        self.ggml.backend_tensor_get(self.y, self.result.ctypes.data, 0, self.result.nbytes)
        return self.result
