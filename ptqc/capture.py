"""Capture: the FX graphs that a model runs as, their placeholders tied to the parameters they read.

Dynamo runs the model on a batch with a backend that keeps each graph and executes it unchanged. One graph is the
good case; graph breaks give several, and everything that reads them works per graph.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["CapturedGraph", "capture", "parameter_name"]

log = logging.getLogger("ptqc")


@dataclass(frozen=True)
class CapturedGraph:
    """A graph and the parameter behind each placeholder that dynamo lifted."""

    module: fx.GraphModule
    parameters: Mapping[fx.Node, Tensor]


def parameter_name(node: fx.Node) -> str:
    """The qualified name that dynamo gives a lifted placeholder, "a.weight" for L['self']._modules['a'].weight."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", node.name)
    text = str(name() if callable(name) else name)  # a method up to torch 2.11
    for piece in ("L['self']", "L['mod']", "_modules", "_parameters", "_buffers", "L["):
        text = text.replace(piece, "")
    cleaned = text.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return ".".join(part for part in cleaned.split(".") if part)


def capture(model: nn.Module, batch: Mapping[str, Any]) -> list[CapturedGraph]:
    """Run `model(**batch)` once through dynamo and return its graphs, in the order in which they ran.

    The model is unchanged. Raises whatever the model itself raises on the batch.
    """
    graphs: list[CapturedGraph] = []

    def keep(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        pairs = zip(placeholders, inputs, strict=True)
        graphs.append(CapturedGraph(module, {node: value for node, value in pairs if isinstance(value, nn.Parameter)}))
        return module.forward

    torch._dynamo.reset()
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            torch.compile(model, backend=keep)(**batch)
    finally:
        torch._dynamo.reset()
    log.info("captured %d graph(s)", len(graphs))
    return graphs
