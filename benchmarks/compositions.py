"""Every transform with every method: does it run, and is it ever worse than the method alone?

    python -m benchmarks.compositions [--samples 32] [--json FILE]

Two settings: 3-bit weights in groups of 128 with inputs in float, and 4-bit weights with 8-bit inputs, one scale per
token.

Output error: squared error of the hidden states behind every layer and of the logits, relative to their size, in the
mean, on English that calibration has not seen; the ratio is to the method alone. Also perplexity and KL to the float
model.
"""

import argparse
import itertools
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import reference

TRANSFORMS = ("smoothquant", "awq", "hadamard")
METHODS = ("rtn", "gptq", "hqq")
SETTINGS = {
    "3 bits, float inputs": {"bits": 3, "group_size": 128},
    "4 bits, int8 inputs": {"bits": 4, "group_size": 128, "activation": "int8-token"},
}
ALLOWED = 1.01


def error(model, exact, windows):
    """Squared error of hidden states and logits, relative to their size, in the mean."""
    pairs = zip(hidden_states(model, windows), exact, strict=True)
    return sum(float((mine - theirs).square().sum() / theirs.square().sum()) for mine, theirs in pairs) / len(exact)


def hidden_states(model, windows):
    """Hidden states behind every layer, and logits."""
    with torch.no_grad():
        found = [model(window, output_hidden_states=True) for window in windows]
    return [torch.cat(parts) for parts in zip(*([*out.hidden_states[1:], out.logits] for out in found), strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scale = reference.Scale(reference.load(), windows=16)
    windows = scale.recorded["docs"].windows[:8].split(1)
    exact, data, rows = hidden_states(scale.model, windows), reference.calibration("docs", arguments.samples), []
    for (setting, options), method in itertools.product(SETTINGS.items(), METHODS):
        alone = None
        for chain in ([method], *([transform, method] for transform in TRANSFORMS)):
            model, seconds = scale.quantized(chain, calibration=data, **options)
            row = {"setting": setting, "chain": "+".join(chain), "error": error(model, exact, windows)}
            alone = alone or row["error"]
            rows.append(row | {"ratio": row["error"] / alone, "seconds": seconds} | scale.score(model))
            print(rows[-1], flush=True)
    table = Table("setting", "chain", "output error", "ratio to the method alone", "perplexity", "KL", "seconds")
    for row in rows:
        cells = (f"{row['error']:.5f}", f"{row['ratio']:.3f}", f"{row['perplexity']:.3f}", f"{row['kl']:.4f}")
        table.add_row(row["setting"], row["chain"], *cells, f"{row['seconds']:.1f}")
    console = Console()
    console.print(table)
    worst = max(row["ratio"] for row in rows)
    console.print(f"worst ratio {worst:.3f} (bar {ALLOWED})")
    if arguments.json:
        reference.write(arguments.json, rows, settings=SETTINGS, worst_ratio=worst)


if __name__ == "__main__":
    main()
