"""Do the calibrated methods run on every architecture, and is every linear-like weight quantized or listed?

    python -m benchmarks.zoo_methods [--methods gptq,awq,smoothquant,quip_sharp] [--only causal/gpt2 ...] [--json FILE]

Each tiny model of `benchmarks/zoo` is quantized in memory with a few batches of random inputs. A row holds for a method
whether the outputs are finite, how far they are from the float model, the route of the calibration, what became of the
scale groups, and the weights that eager execution multiplies with but that are neither quantized nor listed.
"""

import argparse
import time

from benchmarks.architectures import watch_products
from benchmarks.sweep import by_method, sweep, write

METHODS = "gptq,awq,smoothquant,quip_sharp"
BATCHES = 2
ENOUGH = 0.97


def check(key, methods):
    """One row per method for one architecture. The model is captured once: methods get the same graphs."""
    import torch

    import ptqc.engine.run
    from benchmarks.zoo import zoo
    from ptqc.capture import capture

    torch.set_num_threads(1)
    captured = {}

    def once(model, batch, **options):
        shapes = tuple((name, getattr(value, "shape", value)) for name, value in batch.items())
        if (id(model), shapes) not in captured:
            captured[id(model), shapes] = capture(model, batch, **options)
        return captured[id(model), shapes]

    ptqc.engine.run.capture = ptqc.sites.capture = once
    rows, subject = [], None
    for method in methods:
        row, started = {"arch": key, "method": method}, time.time()
        try:
            subject = subject or Subject(zoo.Arch.parse(key))
            row |= subject.quantized(method)
        except Exception as failure:
            row["failure"] = f"{type(failure).__name__}: {failure}"[:600]
        if subject is not None:
            subject.restore()
        rows.append(row | {"seconds": round(time.time() - started, 1)})
    return rows


class Subject:
    """A tiny model with its inputs, what it says and multiplies with, and a way back to what it was."""

    def __init__(self, arch):
        import torch

        from benchmarks.zoo import zoo
        from ptqc.sites import find_sites

        self.model, batch = zoo.build(arch)
        self.batches = [batch, *(zoo.example_inputs(self.model, arch, seed) for seed in range(1, BATCHES))]
        self.products = watch_products(self.model, batch)
        with torch.no_grad():
            self.exact = self.output()
        self.listed = {entry.name for entry in find_sites(self.model, batch)[1]}
        self.held = [
            (module, name, weight, weight.detach().clone())
            for module in self.model.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]

    def output(self):
        """What the model says to its first batch."""
        import torch

        from benchmarks.zoo import zoo

        with torch.no_grad():
            return zoo.primary_output(self.model(**self.batches[0])).double()

    def restore(self):
        """Put every parameter back with its values."""
        for module, name, weight, value in self.held:
            weight.data.copy_(value)
            module._parameters[name] = weight

    def quantized(self, method):
        """Quantize the model and compare it with itself before."""
        import torch

        import ptqc
        from ptqc.qtensor import QuantTensor

        ptqc.quantize(self.model, method, calibration=self.batches, progress=False)
        found, report = self.output(), ptqc.report_of(self.model)
        stored = {name for name, weight in self.model.named_parameters() if isinstance(weight, QuantTensor)}
        skipped = set(report.skipped) if report else set()
        return {
            "finite": bool(torch.isfinite(found).all()),
            "rel_to_float": float((found - self.exact).norm() / self.exact.norm()),
            "quantized": len(stored),
            "listed": len(self.listed | skipped),
            "silent": sorted(self.products - stored - self.listed - skipped),
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
    rows = by_method(found, methods)
    summary = summarise(rows, methods)
    if arguments.json:
        write(arguments.json, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
