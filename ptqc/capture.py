"""Capture: the FX graphs that a model runs as, their placeholders tied to the parameters they read.

Dynamo runs the model on a batch with a backend that keeps each graph and executes it unchanged. One graph is the
good case; graph breaks give several, and everything that reads them works per graph.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["CapturedGraph", "capture", "parameter_name"]

log = logging.getLogger("ptqc")


@dataclass(frozen=True)
class CapturedGraph:
    """A graph, the parameter behind each placeholder that dynamo lifted, and the values it was first called with.

    stopped_by: why dynamo ended the graph here, None if it is the model's end.
    """

    module: fx.GraphModule
    parameters: Mapping[fx.Node, Tensor]
    values: Sequence[Any] = field(default=(), repr=False)
    stopped_by: str | None = None


class _Stop(Exception):
    """Ends a capture before anything is executed."""


def parameter_name(node: fx.Node) -> str:
    """The qualified name that dynamo gives a lifted placeholder, "a.weight" for L['self']._modules['a'].weight."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", node.name)
    text = str(name() if callable(name) else name)  # a method up to torch 2.11
    for piece in ("L['self']", "L['mod']", "_modules", "_parameters", "_buffers", "L["):
        text = text.replace(piece, "")
    cleaned = text.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return ".".join(part for part in cleaned.split(".") if part)


def capture(model: nn.Module, batch: Mapping[str, Any], *, is_run: bool = True) -> list[CapturedGraph]:
    """Run `model(**batch)` once through dynamo and return its graphs, in the order in which they ran.

    The model is unchanged. is_run: execute the graphs; without, capture ends at the first graph, and no parameter is
    read (a model whose weights are not there yet can be captured that way, if it is one graph).

    A transformers model is asked for no cache of keys and values: returned, they would be results of the graph, which
    nothing may change, although only the model itself reads them.

    Raises whatever the model itself raises on the batch.
    """
    graphs: list[CapturedGraph] = []

    def keep(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        pairs = zip(placeholders, inputs, strict=True)
        parameters = {node: value for node, value in pairs if isinstance(value, nn.Parameter)}
        graphs.append(CapturedGraph(module, parameters, tuple(inputs), _break_of(module)))
        if not is_run:
            raise _Stop
        return module.forward

    torch._dynamo.reset()
    try:
        with torch.no_grad(), _without_cache(model), torch._dynamo.config.patch(recompile_limit=64):
            torch.compile(model, backend=keep)(**batch)
    except Exception as error:
        if is_run or not graphs or not _is_stop(error):
            raise
    finally:
        torch._dynamo.reset()
    log.info("captured %d graph(s)", len(graphs))
    return graphs


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Ask every part of a transformers model for no cache, by its configuration."""
    held = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    asked = [config for config in held.values() if getattr(config, "use_cache", False) is True]
    for config in asked:
        config.use_cache = False
    try:
        yield
    finally:
        for config in asked:
            config.use_cache = True


def _break_of(module: fx.GraphModule) -> str | None:
    """The first line of why dynamo ended a graph before the end of the function."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return None
    return (str(getattr(reason, "reason", "")).strip().splitlines() or ["a graph break"])[0]


def _is_stop(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _Stop):
            return True
        error = error.__cause__ or error.__context__ or getattr(error, "inner_exception", None)
    return False
