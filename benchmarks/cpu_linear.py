"""How fast are products with 4-bit weights on this CPU, beside bfloat16, ATen's int4 and llama.cpp?

Every side has the same weight in groups of 32 (llama.cpp: Q4_0, the same bits) and is timed in turns, the least of many
runs counts. Ours and ATen's take bfloat16 activations, llama.cpp's float32 ones. Errors are against float64 products
with the dequantized weight; llama.cpp rounds the float weight itself, hence by other scales.

    python -m benchmarks.cpu_linear [--quick] [--threads 1 2] [--ggml FOLDER] [--json FILE]

--ggml: where ggml's shared libraries are; by default those that llama-cpp-python installed, else llama.cpp is left out.
Beside the JSON a plot is drawn (if matplotlib is installed): speed-up over bfloat16 against the rows.
"""

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch

from benchmarks.ggml import Ggml
from ptqc.codegen.build import load_text
from ptqc.codegen.cpp.isa import running_isa
from ptqc.methods import METHODS, quantize_weight
from ptqc.requests import TARGETS, KernelRequest
from ptqc.spec import WeightSpec

SHAPES, ROWS = ((4096, 4096), (14336, 4096)), (1, 4, 16, 64, 256)
SPEC, BITS = "int4g32", 4.5
BFLOAT16, FLOAT32, ATEN, LLAMA = "bfloat16", "float32", "ATen int4", "llama.cpp Q4_0"


class Sides:
    """What is timed: name -> function of (x bfloat16, threads) that computes [rows, n]."""

    def __init__(self, n, k, ggml, specs):
        self.weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
        self.ggml, self.dense, self.run = ggml, {}, {}
        halves = self.weight.bfloat16()
        self.dense[BFLOAT16], self.run[BFLOAT16] = halves, lambda x: torch.nn.functional.linear(x, halves)
        self.run[FLOAT32], self.dense[FLOAT32] = self._float32, self.weight
        for spec in specs:
            self._add(f"ptqc {spec}", spec, "cpp")
        self._add(ATEN, SPEC, "aten_int4")

    def _float32(self, x):
        return torch.nn.functional.linear(x.float(), self.weight)

    def _add(self, name, spec, target):
        stored = quantize_weight(self.weight.bfloat16(), METHODS.get("rtn")(), WeightSpec.parse(spec))
        request = KernelRequest(stored.spec, *self.weight.shape, torch.bfloat16, "cpu")
        module = load_text(TARGETS.get(target)().emit(request).text)
        parts = module.prepare(list(stored.parts.values()))
        self.dense[name] = stored.dequantize()
        self.run[name] = lambda x: module.run(x, parts, [])

    def with_rows(self, x, threads):
        """name -> function without arguments, for these rows."""
        calls = {name: lambda run=run: run(x) for name, run in self.run.items()}
        if self.ggml is not None:
            product = self.ggml.product("Q4_0", self.weight.numpy(), x.shape[0])
            product.set(x.float().numpy())

            def llama():
                product.run(threads)
                return torch.from_numpy(product.get()) if x.shape[0] <= 4 else None

            calls[LLAMA] = llama
        return calls


def time_all(calls, seconds, threads):
    """Least milliseconds of each call, timed in turns for `seconds` each.

    One thread is timed by the CPU's time for the process, which other work on the machine disturbs less.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    least = dict.fromkeys(calls, float("inf"))
    spent = dict.fromkeys(calls, 0.0)
    for call in calls.values():
        call()
    while min(spent.values()) < seconds:
        for name, call in calls.items():
            if spent[name] >= seconds and spent[name] > 3 * least[name]:
                continue
            for _ in range(5):
                start = clock()
                call()
                took = clock() - start
                least[name], spent[name] = min(least[name], took), spent[name] + took
                if took > seconds / 4:
                    break
    return {name: value * 1e3 for name, value in least.items()}


def errors(calls, sides, x):
    """Relative error of each side on its own weight, in float64."""
    found = {}
    for name, call in calls.items():
        exact = x.double() @ sides.dense.get(name, sides.weight).double().T
        found[name] = float((call().double() - exact).norm() / exact.norm())
    return found


def measure(arguments, ggml):
    rows = []
    for n, k in SHAPES:
        sides = Sides(n, k, ggml, arguments.specs)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for m in (1, 16) if arguments.quick else ROWS:
                x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
                calls = sides.with_rows(x, threads)
                error = errors(calls, sides, x) if m <= 4 and threads == arguments.threads[0] else {}
                for name, milliseconds in time_all(calls, arguments.seconds, threads).items():
                    row = {"n": n, "k": k, "rows": m, "threads": threads, "side": name, "ms": milliseconds}
                    rows.append(row | {"gops": 2e-6 * m * n * k / milliseconds, "error": error.get(name)})
                print(line_of(rows, n, k, m, threads), flush=True)
    return rows


def line_of(rows, n, k, m, threads):
    """One row of the table: milliseconds by side."""
    chosen = {r["side"]: r for r in rows if (r["n"], r["k"], r["rows"], r["threads"]) == (n, k, m, threads)}
    cells = " | ".join(f"{r['ms']:.3f}" for r in chosen.values())
    head = f"| shape | threads | rows | {' | '.join(chosen)} |\n|{'---|' * (3 + len(chosen))}\n"
    return (head if len(rows) == len(chosen) else "") + f"| {n}x{k} | {threads} | {m} | {cells} |"


def plot(rows, path):
    """Speed-up over bfloat16 against the rows, one panel per shape and number of threads."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    panels = sorted({(r["n"], r["k"], r["threads"]) for r in rows})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for axis, (n, k, threads) in zip(axes[0], panels, strict=True):
        here = [r for r in rows if (r["n"], r["k"], r["threads"]) == (n, k, threads)]
        base = {r["rows"]: r["ms"] for r in here if r["side"] == BFLOAT16}
        for side in dict.fromkeys(r["side"] for r in here):
            points = [(r["rows"], base[r["rows"]] / r["ms"]) for r in here if r["side"] == side]
            axis.plot(*zip(*points, strict=True), marker="o", label=side)
        axis.axhline(16 / BITS, color="grey", linestyle=":", label="16 / 4.5 bits of memory")
        axis.set(title=f"{n}x{k}, {threads} thread(s)", xlabel="rows", xscale="log", yscale="log")
        axis.set_xticks(sorted(base), [str(count) for count in sorted(base)], minor=False)
        axis.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axis.minorticks_off()
    axes[0][0].set_ylabel("times as fast as bfloat16")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=7, fontsize="small", frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 and 16 rows only")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--specs", nargs="*", default=[SPEC, "int4g128"], help="of ours")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each side in each row")
    parser.add_argument("--ggml", type=Path, help="folder of ggml's shared libraries")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ggml = Ggml.find(arguments.ggml)
    rows = measure(arguments, ggml)
    for row in rows:
        if row["error"] is not None and row["threads"] == arguments.threads[0] and row["rows"] == 1:
            print(f"relative error {row['n']}x{row['k']} {row['side']}: {row['error']:.1e}")
    if arguments.json:
        document = {
            "rows": rows, "date": datetime.date.today().isoformat(), "isa": running_isa().name, "cpu": cpu_name(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        plot(rows, arguments.json.with_suffix(".png"))


def cpu_name():
    """As Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
