"""What transforms do for a model whose activations have outliers, as those of large models have.

    python -m benchmarks.outliers [--factors 50 200] [--channels largest random] [--windows 32] [--json FILE]

The reference model gets them without changing its function: in 1% of the channels of every norm the gain is multiplied
by a factor, and the columns of the linears behind it are divided by it. The channels are those with the largest values
already, as outliers come about in training, or random ones. Calibrated on English, scored on English that was not seen
and on code.

8 bits: weights and inputs, one calibrated (static) scale per input, by itself and behind SmoothQuant; and LLM.int8.
3 bits: weights alone, groups of 128 with a zero, rounded to nearest by themselves and behind AWQ. `recovered` is the
share of what rounding loses in perplexity that AWQ brings back.
"""

import argparse
import itertools
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import reference
from ptqc.passes.methods.llm_int8 import LlmInt8
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.passes.methods.w8a8 import W8A8
from ptqc.passes.transforms.awq import AWQ
from ptqc.passes.transforms.smoothquant import SmoothQuant

SHARE = 0.01
STATIC, W3 = W8A8(inputs="static"), {"bits": 3, "group_size": 128}
CASES = {
    "w8a8, per token": (W8A8(), {}),
    "w8a8, static": (STATIC, {}),
    "llm_int8": (LlmInt8(), {}),
    "smoothquant 0.5 + w8a8, static": ([SmoothQuant(), STATIC], {}),
    "smoothquant 0.8 + w8a8, static": ([SmoothQuant(alpha=0.8), STATIC], {}),
    "smoothquant search + w8a8, static": ([SmoothQuant(alpha="search"), STATIC], {}),
    "rtn, 3 bits": (RoundToNearest(symmetric=False), W3),
    "awq without clipping, 3 bits": ([AWQ(clipping=False), RoundToNearest(symmetric=False)], W3),
    "awq, 3 bits": ([AWQ(), RoundToNearest(symmetric=False)], W3),
}
TEXTS = ("docs", "code")


def norms(model):
    """Each norm before linears, with them."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)
        yield layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)


@torch.no_grad()
def largest_values(model, data):
    """The largest absolute value of each output channel of each norm, a tensor [channels] for each."""
    found = {norm: torch.zeros(len(norm.weight)) for norm, _ in norms(model)}

    def keep(norm, _, output):
        found[norm] = torch.maximum(found[norm], output.abs().flatten(0, -2).amax(0))

    hooks = [norm.register_forward_hook(keep) for norm in found]
    for tokens in data:
        model(tokens)
    for hook in hooks:
        hook.remove()
    return list(found.values())


@torch.no_grad()
def with_outliers(model, factor, channels, data):
    """Give a model outliers in place; returns the model."""
    generator = torch.Generator().manual_seed(0)
    values = largest_values(model, data) if channels == "largest" else None
    for i, (norm, linears) in enumerate(norms(model)):
        size = len(norm.weight)
        order = torch.randperm(size, generator=generator) if values is None else values[i].argsort(descending=True)
        chosen = order[: max(1, round(SHARE * size))]
        norm.weight[chosen] *= factor
        for linear in linears:
            linear.weight[:, chosen] /= factor
    return model


def measure(factor, channels, windows, samples):
    """One row per case."""
    data = reference.calibration("docs", samples)
    judge = reference.Scale(with_outliers(reference.load(), factor, channels, data), TEXTS, windows)
    exact = {text: judge.perplexity(text) for text in TEXTS}
    setting = {"factor": factor, "channels": channels}
    rows = [setting | {"case": "float"} | {text: {"perplexity": exact[text]} for text in TEXTS}]
    for name, (method, options) in CASES.items():
        model, seconds = judge.quantized(method, calibration=data, **options)
        found = {text: judge.score(model, text) for text in TEXTS}
        for text in TEXTS:
            found[text]["relative"] = found[text]["perplexity"] / exact[text]
        rows.append(setting | {"case": name, "seconds": seconds} | found)
        print(rows[-1], flush=True)
    return with_recovered(rows)


def with_recovered(rows):
    """Add to the rows of AWQ the share of the loss of rtn that it brings back."""
    by_case = {row["case"]: row for row in rows}
    rtn, exact = by_case["rtn, 3 bits"], by_case["float"]
    for row in rows:
        if row["case"].startswith("awq"):
            for text in TEXTS:
                lost = rtn[text]["perplexity"] - exact[text]["perplexity"]
                row[text]["recovered"] = (rtn[text]["perplexity"] - row[text]["perplexity"]) / lost
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=float, nargs="+", default=[50.0, 200.0])
    parser.add_argument("--channels", nargs="+", default=["largest", "random"], choices=["largest", "random"])
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens scored, of each text")
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = itertools.product(arguments.factors, arguments.channels)
    rows = [row for setting in settings for row in measure(*setting, arguments.windows, arguments.samples)]
    measures = ("perplexity", "relative", "kl", "recovered")
    columns = [f"{measure}, {text}" for text in TEXTS for measure in measures]
    table = Table("factor", "channels", "case", *columns, "seconds")
    for row in rows:
        values = [f"{row[text][measure]:.4f}" if measure in row[text] else "" for text in TEXTS for measure in measures]
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
        table.add_row(f"{row['factor']:g}", row["channels"], row["case"], *values, seconds)
    Console(width=200).print(table)
    if arguments.json:
        reference.write(arguments.json, rows, share=SHARE, samples=arguments.samples, windows=arguments.windows)


if __name__ == "__main__":
    main()
