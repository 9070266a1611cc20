"""How much memory does a compiled model take beside its stored weights?

    python -m benchmarks.held [--layers 8] [--specs int4g32 nf4g64 int8 e8p] [--json FILE]

Decoder layers of width 2048 (query, key, value; gate, up) with random stored weights, compiled for the CPU and called
once. Each run is a process of its own. `live`: bytes of all tensors there are, by storage; `resident`: VmRSS of the
process; both less what was there before the model. `kept` runs with `keep_stored`, as both orders in memory.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from benchmarks import reference
from ptqc import storage
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec

WIDTH, HIDDEN, HEADS, KEY_HEADS = 2048, 5632, 32, 8


class Layer(nn.Module):
    """A decoder layer without a cache."""

    def __init__(self, spec, seeded):
        super().__init__()
        keys = WIDTH // HEADS * KEY_HEADS
        shapes = {"q": (WIDTH, WIDTH), "k": (keys, WIDTH), "v": (keys, WIDTH), "o": (WIDTH, WIDTH)}
        shapes |= {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
        for name, shape in shapes.items():
            linear = nn.Linear(shape[1], shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(random_weight(spec, shape, seeded), requires_grad=False)
            setattr(self, name, linear)
        self.before, self.behind = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x):
        read = self.before(x)
        q, k, v = (part(read).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        read = self.behind(x)
        return x + self.down(functional.silu(self.gate(read)) * self.up(read))


def random_weight(spec, shape, seeded):
    """Random bytes as codes, small scales."""
    parts = {}
    for name, (size, dtype) in storage.part_layout(spec, shape).items():
        values = torch.rand(size, generator=seeded)
        parts[name] = (values * 256).to(torch.uint8) if dtype == torch.uint8 else (values / 1000).to(dtype)
    return QuantTensor(parts, spec, shape, torch.float32)


def live_tensors():
    """Every tensor of this process that has memory."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return [tensor for tensor in found if tensor.layout == torch.strided and not tensor.is_meta]


def live_bytes():
    """Bytes of all tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in live_tensors()}.values())


def resident():
    """VmRSS of this process, once the allocator has given back what it holds in vain."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) << 10


def measure(spec, layers, is_kept):
    """One model in this process."""
    warm = torch.compile(nn.Linear(8, 8), backend="ptqc")  # imports and threads, not the model
    with torch.no_grad():
        warm(torch.ones(1, 8))
    empty = live_bytes(), resident()
    model = nn.Sequential(*(Layer(WeightSpec.parse(spec), torch.Generator().manual_seed(0)) for _ in range(layers)))
    stored = sum(weight.nbytes for weight in model.parameters() if isinstance(weight, QuantTensor))
    before = live_bytes() - empty[0], resident() - empty[1]
    run = torch.compile(model.eval(), backend="ptqc", options={"keep_stored": is_kept})
    started = time.perf_counter()
    with torch.no_grad():
        result = run(torch.ones(1, 1, WIDTH))
    seconds = time.perf_counter() - started
    after = live_bytes() - empty[0], resident() - empty[1]
    return {
        "spec": spec, "kept": is_kept, "stored": stored, "live_before": before[0], "live": after[0],
        "resident_before": before[1], "resident": after[1], "seconds": seconds, "sum": float(result.sum()),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--specs", nargs="*", default=["int4g32", "nf4g64", "int8", "e8p"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", nargs=2, help="spec and 0 or 1: measure this here (used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case[0], arguments.layers, arguments.case[1] == "1")))
        return
    rows = []
    for spec in arguments.specs:
        for kept in "10":
            words = [sys.executable, "-m", "benchmarks.held", "--layers", str(arguments.layers), "--case", spec, kept]
            rows.append(json.loads(subprocess.run(words, capture_output=True, check=True).stdout.splitlines()[-1]))
    table = Table("", "kept", "stored MB", "live", "of stored", "resident before", "after", "seconds", title="memory")
    for row in rows:
        sizes = [f"{row[name] / 1e6:.0f}" for name in ("stored", "live", "resident_before", "resident")]
        share = f"{row['live'] / row['stored']:.2f}"
        table.add_row(row["spec"], str(row["kept"]), *sizes[:2], share, *sizes[2:], f"{row['seconds']:.1f}")
    Console().print(table)
    if arguments.json:
        reference.write(arguments.json, rows)


if __name__ == "__main__":
    main()
