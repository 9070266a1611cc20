"""Does `torch.compile(model, backend="ptqc", options=...)` agree with the quantized model run eagerly, everywhere?

    python -m benchmarks.architectures [--only causal/gpt2 ...] [--methods hqq,nf4] [--workers 2] [--json FILE]

Each tiny model of `benchmarks/zoo` is compiled with quantization inside the backend, then run
eagerly with the very weights the backend made. Reported per model and method: relative error of the output, weights
quantized, weights left in float with and without a reason. Linear-like weights are counted by watching eager execution,
independently of the compiler's own analysis; those that a graph break puts between graphs are counted apart, since the
backend warns of them. Finished models are kept in the JSON-lines file beside FILE, so a killed run resumes.
"""

import argparse
import logging
import time

from benchmarks.sweep import by_method, sweep, write

TOLERANCE = 1e-3
INNER = "what compiles the lowered graph: Inductor, or nothing (ten times faster; checks our passes only)"


def watch_products(model, inputs):
    """Names of the float matrices that eager execution multiplies with, found by storage."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    owner = {p.untyped_storage()._cdata: name for name, p in model.named_parameters() if p.ndim >= 2}
    aten = torch.ops.aten
    operands = {
        aten.mm.default: (0, 1),
        aten.addmm.default: (1, 2),
        aten.bmm.default: (0, 1),
        aten.baddbmm.default: (1, 2),
    }
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            positions = operands.get(func, (0, 1) if "grouped_mm" in str(func) else ())
            for position in positions:
                if isinstance(args[position], torch.Tensor):
                    seen.add(owner.get(args[position].untyped_storage()._cdata))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(**inputs)
    return seen - {None}


class BreakWarnings(logging.Handler):
    """Notes that ptqc warned of weights between graphs, which the compiler cannot reach."""

    seen = False

    def emit(self, record):
        self.seen |= "graph break" in record.getMessage()


def with_weights(model, stored):
    """A copy of the model whose parameters are the given stored weights, tied ones too."""
    import copy

    from torch import nn

    by_id = {id(dict(model.named_parameters())[name]): weight for name, weight in stored.items()}
    memo = {key: nn.Parameter(weight, requires_grad=False) for key, weight in by_id.items()}
    return copy.deepcopy(model, memo)


def check(key, methods, inner):
    """One row per method for one architecture."""
    import torch

    import ptqc.backend
    from benchmarks.zoo import zoo
    from ptqc.backend import kept_weights, stored_weights

    torch.set_num_threads(1)
    if inner == "eager":
        ptqc.backend.compile_fx = lambda module, inputs, config_patches=None: module
    warnings = BreakWarnings()
    logging.getLogger("ptqc").addHandler(warnings)
    rows = []
    for method in methods:
        row = {"arch": key, "method": method}
        start = time.time()
        try:
            model, inputs = zoo.build(key)
            torch._dynamo.reset()
            warnings.seen = False
            options = {"method": method, "exact": True} | (
                {"bits": 4, "group_size": 64} if method in ("hqq", "rtn") else {}
            )
            compiled = torch.compile(model, backend="ptqc", options=options)
            with torch.no_grad():
                zoo_out = zoo.primary_output
                got = zoo_out(compiled(**inputs))
                stored, kept = stored_weights(model), kept_weights(model)
                expected = zoo_out(with_weights(model, stored)(**inputs))
                exact = zoo_out(model(**inputs))
            error = (got.double() - expected.double()).norm() / expected.double().norm()
            left = sorted(watch_products(model, inputs) - set(stored) - set(kept))
            row |= {
                "rel": float(error),
                "rel_to_float": float((expected.double() - exact.double()).norm() / exact.double().norm()),
                "quantized": len(stored),
                "kept": kept,
                "outside": left if warnings.seen else [],
                "silent": [] if warnings.seen else left,
            }
        except Exception as failure:
            row["failure"] = f"{type(failure).__name__}: {failure}"[:600]
        row["seconds"] = round(time.time() - start, 1)
        rows.append(row)
    return rows


def summarise(rows, methods):
    """The table and its totals."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    bad = [row for row in rows if "failure" in row or row["rel"] > TOLERANCE or row["silent"]]
    table = Table("architecture", "method", "relative error", "what", title="misses")
    for row in bad:
        what = row.get("failure") or (f"silent: {row['silent'][:4]}" if row["silent"] else "")
        table.add_row(row["arch"], row["method"], f"{row.get('rel', float('nan')):.1e}", what[:90])
    console.print(table)
    summary = []
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        ran = [row for row in mine if "failure" not in row]
        entry = {
            "method": method,
            "architectures": len(mine),
            "within": sum(row["rel"] <= TOLERANCE for row in ran),
            "failed": len(mine) - len(ran),
            "quantized": sum(row["quantized"] for row in ran),
            "kept_with_reason": sum(len(row["kept"]) for row in ran),
            "outside_graphs_warned": sum(len(row["outside"]) for row in ran),
            "silent": sum(len(row["silent"]) for row in ran),
        }
        summary.append(entry)
        share = 100 * entry["within"] / max(1, len(mine))
        console.print(
            f"{method}: {entry['within']} of {entry['architectures']} within {TOLERANCE:g} ({share:.1f}%), "
            f"{entry['failed']} failed, {entry['quantized']} weights quantized, "
            f"{entry['kept_with_reason']} kept with a reason, "
            f"{entry['outside_graphs_warned']} between graphs (warned), {entry['silent']} silently left"
        )
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="hqq,nf4")
    parser.add_argument("--inner", choices=["inductor", "eager"], default="inductor", help=INNER)
    swept = sweep("benchmarks.architectures", lambda key, a: check(key, a.methods.split(","), a.inner), parser)
    if swept is None:
        return
    found, arguments = swept
    methods = arguments.methods.split(",")
    rows = by_method(found, methods)
    summary = summarise(rows, methods)
    if arguments.json:
        write(arguments.json, {"summary": summary, "rows": rows, "inner": arguments.inner})


if __name__ == "__main__":
    main()
