"""Does `torch.compile(model, backend="ptqc", options=...)` agree with the quantized model run eagerly, everywhere?

    python -m benchmarks.architectures [--only causal/gpt2 ...] [--methods hqq,nf4] [--workers 2] [--json FILE]

Each tiny model of `benchmarks/zoo` is compiled with quantization inside the backend, then run
eagerly with the very weights the backend made. Reported per model and method: relative error of the output, weights
quantized, weights left in float with and without a reason. Linear-like weights are counted by watching eager execution,
independently of the compiler's own analysis; those that a graph break puts between graphs are counted apart, since the
backend warns of them. Finished models are kept in the JSON-lines file beside FILE, so a killed run resumes.
"""

import argparse
import json
import logging
import os
import platform
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOLERANCE = 1e-3
INNER = "what compiles the lowered graph: Inductor, or nothing (ten times faster; checks our passes only)"
CHUNK = 6  # architectures per process: importing transformers takes longer than building a tiny model


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
            options = {"method": method} | ({"bits": 4, "group_size": 64} if method in ("hqq", "rtn") else {})
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


def run_apart(keys, methods, timeout, inner):
    """`check` for several architectures in one process of their own; those it did not finish once more, one by one."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--methods", ",".join(methods)]
    command += ["--inner", inner, "--worker", *keys]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout * len(keys), env=environment)
        output, failure = done.stdout, (done.stderr.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired as expired:
        output, failure = (expired.stdout or b"").decode(), f"more than {timeout} s"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    missing = [key for key in keys if sum(row["arch"] == key for row in rows) < len(methods)]
    rows = [row for row in rows if row["arch"] not in missing]
    if missing and len(keys) > 1:
        return rows + [row for key in missing for row in run_apart([key], methods, timeout, inner)]
    return rows + [{"arch": key, "method": method, "failure": failure} for key in missing for method in methods]


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
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--methods", default="hqq,nf4")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--inner", choices=["inductor", "eager"], default="inductor", help=INNER)
    parser.add_argument("--sample", type=int, help="only so many architectures, drawn at random (seed 0)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs="*", help="run these here and print rows (used by the benchmark itself)")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if arguments.worker:
        for key in arguments.worker:
            for row in check(key, methods, arguments.inner):
                print("ROW " + json.dumps(row), flush=True)
        return
    names = (Path(__file__).parent / "zoo" / "zoo_open.txt").read_text().splitlines()
    keys = arguments.only or [line.split("\t")[0] for line in names if line.strip()]
    if arguments.sample:
        keys = random.Random(0).sample(keys, arguments.sample)
    journal = arguments.json.with_suffix(".jsonl") if arguments.json else None
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal and journal.exists() else []
    todo = [key for key in keys if key not in {row["arch"] for row in rows}]
    chunks = [todo[at : at + CHUNK] for at in range(0, len(todo), CHUNK)]
    finished = 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for new in pool.map(lambda chunk: run_apart(chunk, methods, arguments.timeout, arguments.inner), chunks):
            rows += new
            finished += len({row["arch"] for row in new})
            for row in new:
                print(f"{row['arch']} {row['method']}: {row.get('failure', row.get('rel'))}"[:200], flush=True)
            print(f"[{finished}/{len(todo)}]", flush=True)
            if journal:
                with journal.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
    summary = summarise(rows, methods)
    if arguments.json:
        import torch
        import transformers

        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        result = {"summary": summary, "rows": rows, "versions": versions, "date": time.strftime("%Y-%m-%d")}
        result["inner"] = arguments.inner
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
