"""How many kernels does a decoder layer of a quantized Llama launch for one token?

    python -m benchmarks.launches [--device cuda] [--spec int4g64] [--dtype bfloat16] [--layers 2 4] [--json FILE]

Counted in the code that Inductor writes for a decode step with a static KV cache: calls of its own kernels, of ours,
and of others (attention). What a layer costs is the difference of two models that differ in their number of layers. On
a CPU Inductor puts neighbouring loops into one function, which CUDA would launch one by one: `loops` counts them apart
(an upper bound, since a concatenation is one loop for each piece on a CPU).

With --device cuda, which needs no GPU, the code is what Inductor writes for one (`benchmarks._cuda_code`), behind our
Triton targets, and `entries` are the kernels that some of our products launch before themselves (norms). With
--torch-attention, attention and Inductor's settings are what they would be without us.
"""

import argparse
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import ptqc
from benchmarks import reference
from benchmarks._cuda_code import code_for_cuda
from ptqc.codegen.attention import attention_for
from ptqc.codegen.build import kernel_for, refusals_of, target_for
from ptqc.codegen.gpu.inputs import needs_entry
from ptqc.passes.lower.few_launches import FEW_LAUNCHES
from ptqc.passes.lower.order import lowering
from ptqc.passes.lower.unlift import unlift
from ptqc.pipeline import Context

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 128}  # fmt: skip
LENGTH = 64
KINDS = {
    "ptqc": r"torch\.ops\.ptqc\.\w+",
    "inductor": r"(?:cpp_fused\w*\(|triton_\w+\.run\()",
    "others": r"(?:torch\.ops\.(?!ptqc)\w+\.\w+|extern_kernels\.\w+)",
}
KERNELS = (*KINDS, "entries")
_KERNEL = r"^(cpp_fused\w*) = async_compile\.\w+\(.*?r\'\'\'(.*?)\'\'\'\)"


def launches(code, entered=frozenset()):
    """Launches by kind in the text of one compiled graph, and the loops inside Inductor's functions.

    entered: names of operators that launch a kernel before their product.
    """
    texts, body = code[: code.index("def call(")], code[code.index("def call(") :]
    loops = {name: len(re.findall(r"^    \{$", text, re.M)) for name, text in re.findall(_KERNEL, texts, re.S | re.M)}
    found = Counter()
    for line in body.splitlines():
        called = re.match(r"\s*(?:\w+ = )?(.*)", line.partition("#")[0])[1]
        found.update(kind for kind, pattern in KINDS.items() if re.match(pattern, called))
        found["entries"] += called.partition("(")[0].removeprefix("torch.ops.") in entered
        found["loops"] += loops.get(called.partition("(")[0], 0)
    return found


def quantized(layers, spec="int4g64", dtype=torch.bfloat16):
    """A small Llama with random weights, all of them stored."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)
    model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    return ptqc.quantize(model, "rtn", spec=spec, progress=False)


def static_cache(model, length=LENGTH):
    """A cache that stays where it is, made before the first call (a cache made on first use costs a graph)."""
    config = model.config
    cache = transformers.StaticCache(config=config, max_cache_len=length)
    heads, width = config.num_key_value_heads, config.head_dim
    cache.early_initialization(1, heads, width, model.dtype, torch.device("cpu"))
    return cache


@torch.no_grad()
def of_decode_step(model):
    """Launches of one compiled decode step."""
    from torch._inductor.utils import run_and_get_code

    step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[3]])}
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="ptqc", fullgraph=True)
        _, codes = run_and_get_code(compiled, **step, past_key_values=static_cache(model), use_cache=True)
    return sum(map(launches, codes), Counter())


class OnCuda:
    """Lowers graphs of CPU tensors as on a GPU, and counts the launches of the code for it; runs them as they were."""

    def __init__(self, has_torch_attention=False):
        self.found = Counter()
        self.attention = (lambda request: "not asked for") if has_torch_attention else attention_for
        self.settings = {} if has_torch_attention else FEW_LAUNCHES

    def __call__(self, gm, example_inputs):
        graph = unlift(gm, example_inputs)
        context = Context(kernel_for, target_for, refusals_of, self.attention)
        lowering(graph.parameters, dict(graph.names)).run(graph.module, context)
        entered = {str(chosen.kernel.call) for _, chosen in context.chosen if needs_entry(chosen.request)}
        inputs = [example_inputs[i] for i in graph.kept]
        self.found += launches(code_for_cuda(graph.module, inputs, self.settings), entered)
        return gm.forward


@torch.no_grad()
def of_decode_step_on_cuda(model, has_torch_attention=False):
    """Launches of one decode step compiled for a GPU."""
    backend = OnCuda(has_torch_attention)
    torch._dynamo.reset()
    step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[3]])}
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(**step, past_key_values=static_cache(model), use_cache=True)
    return backend.found


def per_layer(few, many, count=of_decode_step, **options):
    """Launches of one layer: the difference of models with `few` and `many` layers."""
    small, large = (count(quantized(layers, **options)) for layers in (few, many))
    counts = {kind: (large[kind] - small[kind]) / (many - few) for kind in (*KERNELS, "loops")}
    return counts | {"kernels": sum(counts[kind] for kind in KERNELS)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", nargs="+", default=["int4g64"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", nargs=2, type=int, default=[2, 4])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--torch-attention", action="store_true", help="with cuda: without our attention")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = of_decode_step
    if arguments.device == "cuda":
        os.environ |= {"TRITON_INTERPRET": "1", "CXX": "no-such-compiler"}  # Triton's targets serve; nothing is run
        count = partial(of_decode_step_on_cuda, has_torch_attention=arguments.torch_attention)
    rows = [
        {"spec": spec, "dtype": arguments.dtype}
        | per_layer(*arguments.layers, count, spec=spec, dtype=getattr(torch, arguments.dtype))
        for spec in arguments.spec
    ]
    table = Table(*rows[0], title=f"launches per decoder layer, one token, {arguments.device}")
    for row in rows:
        table.add_row(*(f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if arguments.json:
        reference.write(arguments.json, rows, layers=arguments.layers, target=arguments.device)


if __name__ == "__main__":
    main()
