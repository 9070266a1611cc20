"""Do the calibrated methods run on every architecture, and is every linear-like weight quantized or listed?

    python -m benchmarks.zoo_methods [--methods gptq,awq,smoothquant,quip_sharp] [--only causal/gpt2 ...] [--json FILE]

Each tiny model of `benchmarks/zoo` is quantized in memory with a few batches of random inputs. A row holds for a method
whether the outputs are finite, how far they are from the float model, the route of the calibration, what became of the
scale groups, and the weights that eager execution multiplies with but that are neither quantized nor listed.
"""

import argparse
import time

from benchmarks.architectures import watch_products
from benchmarks.sweep import sweep, write

METHODS = "gptq,awq,smoothquant,quip_sharp"
BATCHES = 2
ENOUGH = 0.97


def check(key, methods):
    """One row per method for one architecture."""
    import torch

    from benchmarks.zoo import zoo

    torch.set_num_threads(1)
    rows = []
    for method in methods:
        row, started = {"arch": key, "method": method}, time.time()
        try:
            row |= quantized(*zoo.build(key), zoo.Arch.parse(key), method)
        except Exception as failure:
            row["failure"] = f"{type(failure).__name__}: {failure}"[:600]
        rows.append(row | {"seconds": round(time.time() - started, 1)})
    return rows


def quantized(model, batch, arch, method):
    """Quantize a model and compare it with itself before."""
    import torch

    import ptqc
    from benchmarks.zoo import zoo
    from ptqc.qtensor import QuantTensor
    from ptqc.sites import find_sites

    batches = [batch, *(zoo.example_inputs(model, arch, seed) for seed in range(1, BATCHES))]
    products = watch_products(model, batch)
    with torch.no_grad():
        exact = zoo.primary_output(model(**batch)).double()
    listed = {entry.name for entry in find_sites(model, batch)[1]}
    ptqc.quantize(model, method, calibration=batches, progress=False)
    with torch.no_grad():
        found = zoo.primary_output(model(**batch)).double()
    stored = {name for name, weight in model.named_parameters() if isinstance(weight, QuantTensor)}
    report = ptqc.report_of(model)
    skipped = set(report.skipped) if report else set()
    return {
        "finite": bool(torch.isfinite(found).all()),
        "rel_to_float": float((found - exact).norm() / exact.norm()),
        "quantized": len(stored),
        "listed": len(listed | skipped),
        "silent": sorted(products - stored - listed - skipped),
        "route": report.route if report else "",
        "groups": dict(report.counts) if report else {},
        "notes": report.notes if report else [],
    }


def summarise(rows, methods):
    """Print misses and totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    bad = [row for row in rows if "failure" in row or not row["finite"] or row["silent"]]
    table = Table("architecture", "method", "what", title="misses")
    for row in bad:
        what = row.get("failure") or (f"silent: {row['silent'][:4]}" if row["silent"] else "not finite")
        table.add_row(row["arch"], row["method"], what[:110])
    console.print(table)
    summary = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        good = sum(row in mine and row not in bad for row in mine)
        ran = [row for row in mine if "failure" not in row]
        entry = {"method": method, "architectures": len(mine), "good": good, "failed": len(mine) - len(ran)}
        entry["quantized"] = sum(row["quantized"] for row in ran)
        entry["groups"] = {
            kind: sum(row["groups"].get(kind, 0) for row in ran) for kind in ("folded", "run-time", "undone", "left")
        }
        entry["sequential"] = sum(row["route"].startswith("one graph") for row in ran)
        summary.append(entry)
        share = 100 * good / max(1, len(mine))
        console.print(f"{method}: {good} of {len(mine)} good ({share:.1f}%, bar {ENOUGH:.0%}); {entry}")
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    swept = sweep("benchmarks.zoo_methods", lambda key, arguments: check(key, arguments.methods.split(",")), parser)
    if swept is None:
        return
    found, arguments = swept
    methods = arguments.methods.split(",")
    rows = [new for row in found for new in ([row] if "method" in row else [row | {"method": m} for m in methods])]
    summary = summarise(rows, methods)
    if arguments.json:
        write(arguments.json, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
