"""The code that Inductor would write for a GPU, written without one.

Between AOTAutograd and Inductor all tensors of a graph, which are fake, are moved to `cuda:0`. Inductor is told that
there is one GPU, an H100, and is stopped where it would compile what it has written.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensor
from torch.utils import _triton
from torch.utils._pytree import tree_map

__all__ = ["code_for_cuda"]

_DEVICE = torch.device("cuda", 0)
_H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


class _WrittenError(Exception):
    """Carries the code out of Inductor."""


def code_for_cuda(module: fx.GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any]) -> str:
    """The code for a graph of CPU tensors, as if they were on a GPU."""
    with patch.object(GraphLowering, "compile_to_module", _stop):
        try:
            compile_fx.compile_fx(module, list(inputs), inner_compile=_compile_for_cuda, config_patches=dict(settings))
        except Exception as error:
            return _written(error)
    raise AssertionError("Inductor compiled nothing")


def _compile_for_cuda(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
    """Inductor, for functional ATen operators whose tensors move to the GPU."""
    for node in graph.graph.nodes:
        node.args, node.kwargs = tree_map(_on_cuda, (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = tree_map(_on_cuda, node.meta["val"])
    with _one_gpu():
        return compile_fx.compile_fx_inner(graph, tree_map(_on_cuda, list(inputs)), **options)


def _on_cuda(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        with value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_DEVICE)
    return _DEVICE if isinstance(value, torch.device) else value


def _stop(graph: GraphLowering) -> Any:
    raise _WrittenError(graph.codegen()[0].value)


def _written(error: BaseException | None) -> str:
    """The code that an error carries, itself or as its cause."""
    seen = error
    while seen is not None:
        if isinstance(seen, _WrittenError):
            return str(seen)
        seen = seen.__cause__ or seen.__context__
    assert error is not None
    raise error


@contextmanager
def _one_gpu() -> Iterator[None]:
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_rng_state": lambda device=None: torch.zeros(1), "set_rng_state": lambda state, device=None: None,
        "_exchange_device": lambda device: 0, "_maybe_exchange_device": lambda device: 0,
        "get_device_properties": lambda device=None: _H100, "get_device_capability": lambda device=None: (9, 0),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, staticmethod(answer)))
        stack.enter_context(patch.object(scheduler, "has_triton", lambda: True))
        stack.enter_context(patch.object(AsyncCompile, "triton", lambda *arguments, **options: None))
        stack.enter_context(patch.object(_triton, "triton_hash_with_backend", lambda: "none"))
        yield
