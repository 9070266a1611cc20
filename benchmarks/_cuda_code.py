"""The code that Inductor would write for a GPU, written without one.

A lowered graph is told that all its tensors are on `cuda:0`; Inductor works on fake tensors, and is stopped where it
would compile what it has written. It is told that there is one GPU, an H100.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

__all__ = ["code_for_cuda"]

_DEVICE = torch.device("cuda", 0)
_H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


class _WrittenError(Exception):
    """Carries the code out of Inductor."""


def code_for_cuda(module: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """The code for a graph of CPU tensors, as if they were on a GPU. The module is not changed."""
    mode = detect_fake_mode([node.meta.get("example_value") for node in module.graph.nodes]) or FakeTensorMode()
    moved = fx.GraphModule(torch.nn.Module(), fx.Graph())
    moved.graph = fx.Graph()
    values = {node: node for node in ()}
    for node in module.graph.nodes:
        values[node] = moved.graph.node_copy(node, values.__getitem__)
        values[node].args, values[node].kwargs = tree_map(_on_cuda, (values[node].args, values[node].kwargs))
        if node.op == "get_attr":
            name = str(node.target)
            moved.register_buffer(name, _faked(getattr(module, name), mode))
    moved.recompile()
    with _one_gpu(), patch.object(GraphLowering, "compile_to_module", _stop):
        try:
            compile_fx.compile_fx(moved, [_faked(value, mode) for value in inputs])
        except Exception as error:
            return _written(error)
    raise AssertionError("Inductor compiled nothing")


def _on_cuda(value: Any) -> Any:
    return _DEVICE if isinstance(value, torch.device) or value == "cpu" else value


def _faked(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_DEVICE)


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
        "get_device_properties": lambda device=None: _H100, "get_device_capability": lambda device=None: (9, 0),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        yield
