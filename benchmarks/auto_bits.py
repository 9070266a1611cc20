"""Bits chosen for every weight against the same bits for all: is `auto` below the line between its neighbours?

    python -m benchmarks.auto_bits [--methods rtn hqq gptq] [--json FILE]

Every method quantizes the reference model with 3 and with 4 bits for every weight, and with what `ptqc.auto` chooses
when it may spend as much as lies in the middle between the two, scales included. `line` is the perplexity that lies
on the straight line between the neighbours, at the bits that the choice really takes; below 1 is better than it.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import reference

METHODS = ("rtn", "hqq", "gptq")
NEIGHBOURS = (3, 4)
MEASURES = ("perplexity", "kl")


def measure(scale, method, group, data):
    """Rows of one method: the neighbours, and the choice."""
    rows = []
    for bits in NEIGHBOURS:
        model, seconds = scale.quantized(method, bits=bits, group_size=group, calibration=data)
        rows.append({"method": method, "case": f"{bits} bits for all", "bits": reference.bits_of(model)})
        rows[-1] |= {"seconds": seconds} | scale.score(model)
    low, high = rows
    budget = (low["bits"] + high["bits"]) / 2
    model, seconds = scale.quantized("auto", bits=budget, base=method, group_size=group, calibration=data)
    row = {"method": method, "case": "auto", "bits": reference.bits_of(model), "seconds": seconds} | scale.score(model)
    share = (row["bits"] - low["bits"]) / (high["bits"] - low["bits"])
    for name in MEASURES:
        row[f"{name}_line"] = low[name] + share * (high[name] - low[name])
        row[f"{name}_ratio"] = row[name] / row[f"{name}_line"]
    return [*rows, row]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens to score")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    scale, rows = reference.Scale(reference.load(), windows=arguments.windows), []
    data = reference.calibration("docs", arguments.samples)
    for method in arguments.methods:
        rows += measure(scale, method, arguments.group_size, data)
        print(rows[-1], flush=True)
    table = Table("method", "case", "bits", "perplexity", "line", "/ line", "KL", "line", "/ line", "seconds")
    for row in rows:
        cells = []
        for name in MEASURES:
            cells += [f"{row[name]:.4f}"]
            cells += [f"{row[f'{name}_{what}']:.4f}" if f"{name}_{what}" in row else "" for what in ("line", "ratio")]
        table.add_row(row["method"], row["case"], f"{row['bits']:.3f}", *cells, f"{row['seconds']:.1f}")
    Console(width=140).print(table)
    if arguments.json:
        reference.write(arguments.json, rows, group_size=arguments.group_size, samples=arguments.samples,
                        float_perplexity=scale.perplexity())  # fmt: skip


if __name__ == "__main__":
    main()
