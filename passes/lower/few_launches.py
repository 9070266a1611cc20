"""What Inductor is told of graphs that decode on a GPU, where a launch costs more than most of its own kernels do.

Rotary embedding of queries, of keys, and the updates of a cache are three kernels a layer for Inductor, since their
shapes differ. Combo kernels, one launch for kernels that do not depend on each other, make them one. They are not
tuned: tuning would run kernels that write into the cache.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx

from ptqc.passes.lower.lower_attention import LowerAttention
from ptqc.program import value_of

__all__ = ["FEW_LAUNCHES", "settings_for"]

FEW_LAUNCHES: Mapping[str, Any] = MappingProxyType({"combo_kernels": True, "combo_kernels_autotune": 0})


def settings_for(module: fx.GraphModule, changed: Mapping[str, int]) -> dict[str, Any]:
    """Settings of Inductor for a lowered graph.

    changed: what the passes did, by name; attention of few queries is what tells a step of decoding.
    """
    return dict(FEW_LAUNCHES) if changed.get(LowerAttention.name) and _is_on_gpu(module) else {}


def _is_on_gpu(module: fx.GraphModule) -> bool:
    values = [value_of(node) for node in module.graph.nodes]
    return any(isinstance(value, Tensor) and value.device.type == "cuda" for value in values)
