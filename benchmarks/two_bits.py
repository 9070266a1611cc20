"""Two bits: quip_sharp beside gptq in groups of 128 and hqq in groups of 64, on the reference model.

    python -m benchmarks.two_bits [--windows 32] [--json FILE]

Bits are those of the quantized weights with everything that is stored beside the codes. Perplexity and KL to the float
model are on English that calibration has not seen.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import reference

CASES = {
    "quip_sharp, 2 bits": ("quip_sharp", {"bits": 2}),
    "gptq, 2 bits, g128": ("gptq", {"bits": 2, "group_size": 128}),
    "hqq, 2 bits, g64": ("hqq", {"bits": 2, "group_size": 64}),
    "quip_sharp, 3 bits": ("quip_sharp", {"bits": 3}),
    "gptq, 3 bits, g128": ("gptq", {"bits": 3, "group_size": 128}),
    "quip_sharp, 4 bits": ("quip_sharp", {"bits": 4}),
    "gptq, 4 bits, g128": ("gptq", {"bits": 4, "group_size": 128}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32, help="windows to score")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scale = reference.Scale(reference.load(), windows=arguments.windows)
    data, rows = reference.calibration("docs", arguments.samples), []
    table = Table("method", "bits per weight", "perplexity", "KL", "seconds")
    table.add_row("float", "32", f"{scale.perplexity():.3f}", "-", "-")
    for label, (method, options) in CASES.items():
        model, seconds = scale.quantized(method, calibration=data, **options)
        row = {"method": label, "bits": reference.bits_of(model), "seconds": seconds} | scale.score(model)
        rows.append(row)
        table.add_row(
            label, f"{row['bits']:.3f}", f"{row['perplexity']:.3f}", f"{row['kl']:.4f}", f"{row['seconds']:.1f}"
        )
    Console().print(table)
    if arguments.json:
        reference.write(arguments.json, rows, float_perplexity=scale.perplexity())


if __name__ == "__main__":
    main()
