"""Pass quantize-weights: decide which weights of a graph are stored quantized, and quantize them.

1. A parameter that is a QuantTensor already is taken as it is.
2. A float parameter that `ptqc.weights` calls a weight, and that a rule selects, is quantized (or found in the cache).
It does not fire for embeddings and weights tied to them, routers, and what the rules leave out; the reasons go to the
context. The graph itself changes only in the next pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from ptqc.pipeline import Context, Pass
from ptqc.qtensor import QuantTensor
from ptqc.weights import WeightUse, function_name, weight_uses

__all__ = ["NO_PRODUCT", "QuantizeWeights"]

NO_PRODUCT = "which is no matrix product"
"""How the reason ends for a matrix that is read by nothing that multiplies."""

Store = Callable[[str, WeightUse], QuantTensor | str]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """parameters, names: from `unlift`. store(name, use) gives the stored weight, or the
    reason to leave it."""

    name: ClassVar[str] = "quantize-weights"

    parameters: Mapping[fx.Node, nn.Parameter]
    names: Mapping[fx.Node, str]
    store: Store | None = None

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Fill `context.quantized`. Returns how many weights are stored quantized."""
        for node, value in self.parameters.items():
            if isinstance(value, QuantTensor):
                context.quantized[node] = value
        if self.store is None:
            return len(context.quantized)
        floats = {node: value for node, value in self.parameters.items() if node not in context.quantized}
        for use in weight_uses(module.graph, floats):
            name = self.names[use.placeholder]
            stored = self.store(name, use)
            if isinstance(stored, str):
                context.kept[use.placeholder] = stored
            else:
                context.quantized[use.placeholder] = stored
        for node in floats.keys() - context.quantized.keys() - context.kept.keys():
            if self.parameters[node].ndim > 1 and node.users:
                context.kept[node] = f"read by {', '.join(_readers(node))}, {NO_PRODUCT}"
        return len(context.quantized)


def _readers(node: fx.Node) -> list[str]:
    return sorted({function_name(user) for user in node.users})
