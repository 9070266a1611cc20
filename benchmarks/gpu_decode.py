"""How fast does a Llama decode on a GPU, with our kernels and in 16 bits?

    python -m benchmarks.gpu_decode [--quick] [--layers 8] [--formats int4g128 nf4g64] [--json FILE] [--rehearse]

Layers of a Llama with 8 billion parameters (8 of its 32, or --layers), random weights in bfloat16, batch 1, a prompt
of 128 tokens, then one token at a time. Both sides are compiled by Inductor, ours behind the lowering passes, and a
step is captured in a CUDA graph. Before anything is timed the logits of a step are held against the same model with
the dequantized weights. `limit`: the time that reading every weight once takes at the bandwidth measured in the same
run, as a share of the time of a token. No format is begun after --minutes.

Needs torch and Triton alone: the model is in plain torch, and the passes are called directly. --rehearse runs a tiny
model on the CPU, for the script's own sake: its times mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx

from benchmarks.gpu_linear import copy_bandwidth, random_parts
from benchmarks.plain_llama import PlainLlama, Sizes
from ptqc.codegen.attention import attention_for
from ptqc.codegen.build import kernel_for, refusals_of, target_for
from ptqc.methods import METHODS, quantize_weight
from ptqc.passes.lower.few_launches import settings_for
from ptqc.passes.lower.order import lowering
from ptqc.passes.lower.unlift import tell_static_inputs, unlift
from ptqc.pipeline import Context
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from ptqc.storage import part_names

SIZES = Sizes(8, 4096, 14336, 32, 8, 128256, 1024)
TINY = Sizes(2, 128, 256, 4, 2, 96, 32)
FORMATS = ("int4g128", "int4g32", "nf4g64", "int8", "int3g64", "e8p")
ALLOWED = 3e-2
"""Relative error of logits in bfloat16: both sides round every value between two layers."""


@dataclass(frozen=True)
class Row:
    """One side. kernels: how many products run in each target."""

    side: str
    error: float | None
    prompt_ms: float
    token_ms: float
    limit: float
    speedup: float
    compile_s: float
    kernels: dict[str, int]


def quantized(model: nn.Module, text: str) -> nn.Module:
    """Every linear stored in a spec: rounded to nearest, or random codes where vectors have one code."""
    spec, rounding = WeightSpec.parse(text), METHODS.get("rtn")()
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        if rounding.refuses(spec) is None:
            stored = quantize_weight(weight, rounding, spec)
        else:
            parts = random_parts(spec, *weight.shape, str(weight.device))
            named = dict(zip(part_names(spec), parts, strict=True))
            stored = QuantTensor(named, spec, tuple(weight.shape), weight.dtype)
        module.weight = nn.Parameter(stored, requires_grad=False)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same numbers as plain parameters, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QuantTensor):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model


class Backend:
    """The passes, then Inductor. kernels: products by target, over all graphs."""

    def __init__(self) -> None:
        self.kernels: dict[str, int] = {}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = unlift(gm, example_inputs)
        context = Context(kernel_for, target_for, refusals_of, attention_for)
        changed = lowering(graph.parameters, dict(graph.names)).run(graph.module, context)
        for _, chosen in context.chosen:
            self.kernels[chosen.kernel.target] = self.kernels.get(chosen.kernel.target, 0) + 1
        tell_static_inputs(graph.module)
        inputs, settings = [example_inputs[i] for i in graph.kept], settings_for(graph.module, changed)
        compiled: Any = compile_fx(graph.module, inputs, config_patches=settings or None)
        return lambda *arguments: compiled(*[arguments[i] for i in graph.kept])


@torch.no_grad()
def timed(model: PlainLlama, backend: Any, device: str, prompt: int, tokens: int) -> tuple[Tensor, float, float, float]:
    """Logits of the first step behind the prompt; milliseconds of the prompt and of a token; seconds of compiling."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    ids = torch.arange(prompt, device=device)[None] % model.sizes.vocabulary
    positions = torch.arange(prompt, device=device)
    token, place = ids[:, :1].clone(), torch.full((1,), prompt, device=device)
    start = time.perf_counter()
    compiled(ids, positions)
    logits = compiled(token, place).float()
    compiling = time.perf_counter() - start
    prompt_ms = _milliseconds(lambda: compiled(ids, positions), device, 5)
    step = _captured(lambda: compiled(token, place)) if device == "cuda" else lambda: compiled(token, place)
    return logits, prompt_ms, _milliseconds(step, device, tokens), compiling


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _milliseconds(step: Callable[[], Any], device: str, times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def make(sizes: Sizes, device: str) -> PlainLlama:
    """The model with seeded random weights, made where it runs."""
    torch.manual_seed(0)
    with torch.device(device):
        model = PlainLlama(sizes).to(torch.bfloat16)
    return model.eval()


def run(given: argparse.Namespace) -> Iterator[Row]:
    """16 bits first, then each format; one that is wrong is not timed any further."""
    device = "cpu" if given.rehearse else "cuda"
    sizes = TINY if given.rehearse else replace(SIZES, layers=given.layers)
    prompt, tokens = (8, 3) if given.rehearse else (128, 16 if given.quick else 64)
    bandwidth = 1e10 if given.rehearse else copy_bandwidth()
    end = time.monotonic() + 60 * given.minutes
    _, first_prompt, first_token, compiling = timed(make(sizes, device), "inductor", device, prompt, tokens)
    read = sum(p.numel() * 2 for p in make(sizes, "meta").parameters()) - 2 * sizes.vocabulary * sizes.hidden
    limit = 1e3 * read / bandwidth / first_token
    yield Row("bfloat16", None, first_prompt, first_token, limit, 1.0, compiling, {})
    for spec in given.formats[:1] if given.quick else given.formats:
        if time.monotonic() > end:
            print(f"{spec}: no time left", file=sys.stderr)
            return
        model, backend = quantized(make(sizes, device), spec), Backend()
        stored = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
        bytes_read = sum(weight.nbytes for weight in stored)
        logits, prompt_ms, token_ms, compiling = timed(model, backend, device, prompt, tokens)
        exact, *_ = timed(dequantized(model), "eager", device, prompt, 1)
        error = float((logits - exact).norm() / exact.norm())
        if not error <= ALLOWED:
            print(f"{spec}: wrong, relative error {error:.1e}", file=sys.stderr)
            continue
        limit = 1e3 * bytes_read / bandwidth / token_ms
        yield Row(spec, error, prompt_ms, token_ms, limit, first_token / token_ms, compiling, backend.kernels)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one format, 16 tokens")
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--layers", type=int, default=SIZES.layers)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU; --rehearse runs a tiny model on the CPU")
    device = "rehearsal" if given.rehearse else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}")
    print("| side | error | prompt ms | token ms | of the memory limit | times as fast | compile s | kernels |")
    print("|" + "---|" * 8)
    rows = []
    for row in run(given):
        rows.append(row)
        error = "" if row.error is None else f"{row.error:.1e}"
        kernels = ", ".join(f"{count} {target}" for target, count in row.kernels.items())
        numbers = f"{row.prompt_ms:.2f} | {row.token_ms:.3f} | {row.limit:.0%} | {row.speedup:.2f}"
        print(f"| {row.side} | {error} | {numbers} | {row.compile_s:.0f} | {kernels} |", flush=True)
    if given.json:
        about = {"device": device, "torch": torch.__version__, "date": date.today().isoformat()}
        given.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
