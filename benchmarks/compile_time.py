"""How long does compiling take with backend="ptqc" beside backend="inductor"?

    python -m benchmarks.compile_time [--repeat 3] [--tokens 64] [--threads 1] [--json FILE]

The reference model in bfloat16, a prompt of `--tokens` tokens, from `torch.compile` to the first result. Each run is a
process of its own with empty caches (Inductor's, Triton's and our kernels'); runs alternate, and the least time of each
counts. `lowering`: the part that our passes take, kernels included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import reference

CASES = {
    "inductor": {"backend": "inductor"},
    "ptqc, no stored weights": {"backend": "ptqc"},
    "ptqc, int4g64": {"backend": "ptqc", "spec": "int4g64"},
    "ptqc, nf4g64": {"backend": "ptqc", "spec": "nf4g64"},
}


def measure(case, tokens):
    """Seconds in this process, which has compiled nothing yet."""
    import ptqc
    from ptqc import backend
    from ptqc.pipeline import Pipeline

    model = reference.load().to(torch.bfloat16)
    if "spec" in case:
        ptqc.quantize(model, "nf4" if case["spec"].startswith("nf4") else "rtn", spec=case["spec"], progress=False)
    spent, run = [], Pipeline.run

    def timed(*arguments):
        started = time.perf_counter()
        counts = run(*arguments)
        spent.append(time.perf_counter() - started)
        return counts

    Pipeline.run = timed
    ids = torch.arange(tokens)[None] % 1000
    with torch.no_grad():
        torch.compile(torch.nn.Linear(64, 64), backend=case["backend"])(torch.ones(1, 64))  # imports, not compilation
        started = time.perf_counter()
        torch.compile(model, backend=case["backend"])(input_ids=ids, use_cache=False)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "lowering": sum(spent[1:]), "kernels": len(backend.chosen_kernels(model))}


def in_process(name, tokens, threads):
    """Measure one case in a process with caches of its own."""
    with tempfile.TemporaryDirectory(prefix="ptqc-") as caches:
        fresh = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "PTQC_CACHE"), caches)
        environment = os.environ | fresh | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        words = [sys.executable, "-m", "benchmarks.compile_time", "--case", name, "--tokens", str(tokens)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help="measure this here (used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(CASES[arguments.case], arguments.tokens)))
        return
    runs = {name: [] for name in arguments.only}
    for _ in range(arguments.repeat):
        for name in runs:
            runs[name].append(in_process(name, arguments.tokens, arguments.threads))
    rows = [{"case": name} | min(found, key=lambda run: run["seconds"]) for name, found in runs.items()]
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    table = Table("", "seconds", f"of {rows[0]['case']}", "lowering", "kernels", title="time to compile")
    for row in rows:
        table.add_row(
            row["case"], f"{row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['lowering']:.2f}", str(row["kernels"])
        )
    Console().print(table)
    if arguments.json:
        reference.write(arguments.json, rows, runs=runs, compile_threads=arguments.threads)


if __name__ == "__main__":
    main()
