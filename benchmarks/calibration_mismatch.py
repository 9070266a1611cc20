"""What calibration on the wrong text costs: 3 bits, calibrated on code and on English, scored on both.

python -m benchmarks.calibration_mismatch [--methods gptq,awq] [--json FILE]
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import reference

TEXTS = ("docs", "code")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="gptq,awq")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32, help="windows to score")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    scale = reference.Scale(reference.load(), TEXTS, windows=arguments.windows)
    rows = []
    table = Table("method", "calibrated on", *(f"{head} on {text}" for text in TEXTS for head in ("perplexity", "KL")))
    table.add_row("float", "-", *(cell for text in TEXTS for cell in (f"{scale.perplexity(text):.3f}", "-")))
    for method in ("rtn", *arguments.methods.split(",")):
        for text in TEXTS if method != "rtn" else ("nothing",):
            data = None if method == "rtn" else reference.calibration(text, arguments.samples)
            model, _ = scale.quantized(method, bits=arguments.bits, group_size=128, calibration=data)
            row = {"method": method, "calibrated_on": text} | {name: scale.score(model, name) for name in TEXTS}
            rows.append(row)
            cells = (cell for name in TEXTS for cell in (f"{row[name]['perplexity']:.3f}", f"{row[name]['kl']:.4f}"))
            table.add_row(method, text, *cells)
    Console().print(table)
    if arguments.json:
        floats = {text: scale.perplexity(text) for text in TEXTS}
        reference.write(arguments.json, rows, bits=arguments.bits, float_perplexity=floats)


if __name__ == "__main__":
    main()
