"""Run a module through unlift and the lowering passes, and give back graph, context and a callable."""

import torch

from ptqc.codegen.build import kernel_for
from ptqc.passes.lower.lower_linears import LowerLinears
from ptqc.passes.lower.quantize_weights import QuantizeWeights
from ptqc.passes.lower.unlift import unlift
from ptqc.pipeline import Context, Pipeline


def lowered(model, *inputs, store=None):
    """(text of the graph's calls, context, output) after lowering `model` on `inputs`."""
    kept = {}

    def backend(gm, example_inputs):
        graph = unlift(gm, example_inputs)
        context = Context(kernel_for)
        quantize = QuantizeWeights(graph.parameters, graph.names, store)
        counts = Pipeline([quantize, LowerLinears(dict(graph.names))]).run(graph.module, context)
        kept.update(context=context, counts=counts, module=graph.module)
        return lambda *arguments: graph.module(*[arguments[i] for i in graph.kept])

    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    calls = [str(n.target) for n in kept["module"].graph.nodes if n.op in ("call_function", "call_method")]
    return calls, kept["context"], kept["counts"], output
