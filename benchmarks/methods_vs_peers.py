"""Our data-free methods beside the packages that people use today, on the same tensors in one run.

    python -m benchmarks.methods_vs_peers [--json FILE] [--threads 2]

nf4 and fp4 against bitsandbytes: largest relative difference of the dequantized values. hqq against the hqq package,
every linear of the reference model, 4, 3 and 2 bits, groups of 64: ratio of the reconstruction errors (Frobenius, and
the sum of |error|^0.7 that the paper speaks of), and seconds.
"""

import argparse
import json
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from ptqc.methods import METHODS, quantize_weight

REFERENCE = Path(__file__).parent / "models" / "reference" / "model.safetensors"


def linears():
    """The linear weights of the reference model in float32, by name."""
    tensors = load_file(REFERENCE)
    return {name: weight.float() for name, weight in tensors.items() if "layers" in name and weight.ndim == 2}


def beside_bitsandbytes(weights):
    """Rows of the largest difference over all tensors, relative to the largest value of each."""
    import bitsandbytes.functional as peer

    generator = torch.Generator().manual_seed(0)
    extra = {f"random{k}": torch.randn(256, 1024, generator=generator) * 10.0 ** (k - 3) for k in range(5)}
    rows = []
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            method, worst = METHODS.get(kind)(double_quant=double), 0.0
            for weight in (weights | extra).values():
                stored, state = peer.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
                theirs = peer.dequantize_4bit(stored, state)
                ours = quantize_weight(weight, method, method.spec()).dequantize()
                worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
            rows.append({"method": str(method.spec()), "tensors": len(weights | extra), "largest_difference": worst})
    return rows


def beside_hqq(weights):
    """Rows of error ratios (ours / theirs) and seconds, by bits and by our objective."""
    from hqq.core.quantize import Quantizer

    rows = []
    for bits in (4, 3, 2):
        started, theirs = time.perf_counter(), {}
        for name, weight in weights.items():
            options = {"nbits": bits, "group_size": 64, "axis": 1, "optimize": True}
            stored = Quantizer.quantize(weight, device="cpu", compute_dtype=torch.float32, **options)
            theirs[name] = stored
        their_seconds = time.perf_counter() - started
        numbers = {name: Quantizer.dequantize(*stored).float() for name, stored in theirs.items()}
        for weighted in (True, False):
            method = METHODS.get("hqq")(weighted=weighted)
            started = time.perf_counter()
            ours = {name: quantize_weight(weight, method, method.spec(bits, 64)) for name, weight in weights.items()}
            seconds = time.perf_counter() - started
            errors = {
                name: (ours[name].dequantize() - weight, numbers[name] - weight) for name, weight in weights.items()
            }
            frobenius = [float(a.norm() / b.norm()) for a, b in errors.values()]
            paper = [float(a.abs().pow(0.7).sum() / b.abs().pow(0.7).sum()) for a, b in errors.values()]
            rows.append({
                "bits": bits, "weighted": weighted, "mean": sum(frobenius) / len(frobenius), "worst": max(frobenius),
                "mean_p07": sum(paper) / len(paper), "worst_p07": max(paper), "seconds": seconds,
                "their_seconds": their_seconds,
            })  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    weights, console = linears(), Console()
    exact, ratios = beside_bitsandbytes(weights), beside_hqq(weights)
    table = Table("spec", "tensors", "largest relative difference", title="beside bitsandbytes")
    for row in exact:
        table.add_row(row["method"], str(row["tensors"]), f"{row['largest_difference']:.1e}")
    console.print(table)
    columns = ("bits", "our objective", "error ratio, mean (worst)", "p = 0.7, mean (worst)", "seconds", "theirs")
    table = Table(*columns, title=f"beside hqq, {len(weights)} tensors")
    for row in ratios:
        table.add_row(
            str(row["bits"]), "weighted" if row["weighted"] else "plain", f"{row['mean']:.4f} ({row['worst']:.4f})",
            f"{row['mean_p07']:.4f} ({row['worst_p07']:.4f})", f"{row['seconds']:.2f}", f"{row['their_seconds']:.2f}",
        )  # fmt: skip
    console.print(table)
    if arguments.json:
        versions = {name: version(name) for name in ("torch", "bitsandbytes", "hqq")}
        machine = {"machine": platform.processor() or platform.machine(), "threads": arguments.threads}
        result = {"bitsandbytes": exact, "hqq": ratios, "versions": versions, "date": time.strftime("%Y-%m-%d")}
        arguments.json.write_text(json.dumps(result | machine, indent=1) + "\n")


if __name__ == "__main__":
    main()
