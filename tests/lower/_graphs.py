"""Run a module through unlift and the lowering passes, and give back graphs, context and output."""

import re
from dataclasses import dataclass, field

import torch

from ptqc.codegen.attention import attention_for
from ptqc.codegen.build import kernel_for, refusals_of, target_for
from ptqc.graph_text import graph_text
from ptqc.passes.lower.order import lowering
from ptqc.passes.lower.unlift import unlift
from ptqc.pipeline import Context, Pipeline


@dataclass
class Lowered:
    """texts: the graph after each pass, by its name."""

    texts: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    context: Context | None = None
    module: torch.fx.GraphModule | None = None
    output: torch.Tensor | None = None

    @property
    def calls(self):
        return [str(n.target) for n in self.module.graph.nodes if n.op in ("call_function", "call_method")]

    @property
    def requests(self):
        return [chosen.request for _, chosen in self.context.chosen]


def lower(model, *inputs, store=None, exact=False, dynamic=None, is_checked=True, needs_grad=False):
    """Lower `model` on `inputs`, pass by pass; every graph on the way is run and must agree with the first."""
    result = Lowered()

    def backend(gm, example_inputs):
        graph = unlift(gm, example_inputs)
        arguments = [example_inputs[i] for i in graph.kept]
        result.context = Context(kernel_for, target_for, refusals_of, attention_for, exact)
        first = None
        for step in lowering(graph.parameters, dict(graph.names), store).passes:
            result.counts |= Pipeline([step]).run(graph.module, result.context)
            result.texts[step.name] = _readable(graph_text(graph.module))
            if is_checked and step.name != "quantize-weights":
                values = graph.module(*[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments])
                first = values if first is None else first
                torch.testing.assert_close(values, first, rtol=1e-4, atol=1e-4, msg=lambda m, s=step: f"{s.name}: {m}")
        result.module = graph.module
        return lambda *arguments: graph.module(*[arguments[i] for i in graph.kept])

    torch._dynamo.reset()
    with torch.set_grad_enabled(needs_grad):
        result.output = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    return result


def _readable(text):
    """Without lines for attributes, and with short names."""
    for long, short in ((r"\bL_inputs_(\d+)_", r"x\1"), (r"\bL_self_buffers_(\w+)_", r"\1"), (" float32 cpu", "")):
        text = re.sub(long, short, text)
    names = dict(re.findall(r"^(v\d+) = (self\.\w+)$", text, re.M))
    lines = [line for line in text.splitlines() if " = self." not in line]
    return "\n".join(re.sub(r"\bv\d+\b", lambda found: _short(names.get(found[0], found[0])), line) for line in lines)


def _short(name):
    return re.sub(r"^self\.(?:weight_\d+_)?", "", name)


def lowered(model, *inputs, store=None):
    """(text of the graph's calls, context, counts that are not zero, output) after lowering `model` on `inputs`."""
    result = lower(model, *inputs, store=store)
    return result.calls, result.context, result.counts, result.output
