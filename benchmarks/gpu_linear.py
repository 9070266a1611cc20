"""Linear layers on a GPU: ours beside cuBLAS and others, over numbers of rows, in CUDA graphs.

    python -m benchmarks.gpu_linear [--quick] [--json FILE] [--plot FILE] [--minutes 8] [--rehearse]

Shapes are those of a Llama with 8 B parameters: q, k, v in one; o; gate and up in one; down. Every kernel is first held
against float64 of the dequantized weight at every number of rows; a kernel that is wrong is not timed. Each timing is
the median of replays of a CUDA graph of several launches on weights that together exceed the L2 cache. The memory limit
is (weight + input + output) / bandwidth of a copy measured in the same run. Others are timed where they can be
imported: torch's int4 product, gemlite, bitsandbytes. --rehearse runs tiny shapes through Triton's interpreter on the
CPU, for the script's own sake: its times mean nothing.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.codegen.build import kernel_for
from ptqc.errors import PtqcError
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec
from ptqc.storage import Codes, decode, encode, part_names

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TINY = {"qkv": (192, 256), "down": (128, 512)}
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
OURS = (
    ("int4g128", "float"), ("int4g32", "float"), ("int4g64z", "float"), ("nf4g64", "float"), ("int8", "float"),
    ("int3g64", "float"), ("int2g64", "float"), ("e8p", "float"), ("int8", "int8-token"), ("fp8e4m3", "fp8e4m3-token"),
)  # fmt: skip
MORE_ERROR = {"float": 1e-3, "int8-token": 1.2e-2, "fp8e4m3-token": 4e-2}
L2_BYTES = 128 * 2**20

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One measurement. limit: share of the memory limit that was reached; speedup: over cuBLAS with 16 bits."""

    shape: str
    kernel: str
    rows: int
    error: float
    microseconds: float
    limit: float
    speedup: float


@dataclass(frozen=True)
class Candidate:
    """products: one for each copy of the weight; exact: the weight they stand for; bytes of one weight."""

    name: str
    products: list[Product]
    exact: Tensor
    bytes: int
    bound: float


class Bench:
    """Where things are measured, and until when."""

    def __init__(self, is_rehearsal: bool, minutes: float) -> None:
        self.device = "cpu" if is_rehearsal else "cuda"
        self.is_rehearsal = is_rehearsal
        self.end = time.monotonic() + 60 * minutes
        self.bandwidth = 1e10 if is_rehearsal else copy_bandwidth()

    @property
    def is_late(self) -> bool:
        """True once the time is spent."""
        return time.monotonic() > self.end

    def seconds(self, products: list[Product], x: Tensor) -> float:
        """Median time of one product, the weights taking turns."""
        if self.is_rehearsal:
            start = time.perf_counter()
            products[0](x)
            return time.perf_counter() - start
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for product in products:
                product(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for product in products:
                product(x)
        times = []
        for _ in range(12):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3 / len(products))
        return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes per second read by a sum over 2 GiB."""
    data = torch.ones(2**29, device="cuda")
    times = []
    for _ in range(6):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        data.sum()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
    return 4 * data.numel() / min(times[1:])


# -------------------------------------------------------------------- kernels


def random_parts(spec: WeightSpec, n: int, k: int, device: str) -> list[Tensor]:
    """Parts of a random weight."""
    generator = torch.Generator(device).manual_seed(0)
    book = spec.book
    if book is not None and book.float_dtype is not None:
        codes = torch.randn(n, k, generator=generator, device=device).to(book.float_dtype)
    else:
        most = min(1 << spec.bits, 3 if spec.codebook == "ternary" else 1 << spec.bits)
        dtype = torch.int64 if spec.vector > 1 else torch.uint8
        codes = torch.randint(0, most, (n, k // spec.vector), generator=generator, device=device, dtype=dtype)
    groups = spec.groups((n, k))
    scale = torch.rand(groups, generator=generator, device=device) * 0.01 + 0.005
    zero = None
    if spec.zero != "none":
        zero = torch.randint(0, 1 << spec.bits, groups, generator=generator, device=device).float()
    return list(encode(Codes(codes, scale, zero), spec).values())


def our_candidate(name: str, act: str, n: int, k: int, dtype: torch.dtype, bench: Bench) -> Candidate | None:
    """A kernel of ours, or None if no Triton target takes the request."""
    spec = WeightSpec.parse(name)
    request = KernelRequest(spec, n, k, dtype, bench.device, ActSpec.parse(act))
    try:
        kernel = kernel_for(request)
    except PtqcError as error:
        print(f"  {name} {act}: {error}")
        return None
    if not kernel.target.startswith("triton"):
        print(f"  {name} {act}: served by {kernel.target}: {kernel.refusals}")
        return None
    parts = random_parts(spec, n, k, bench.device)
    exact = decode(dict(zip(part_names(spec), parts, strict=True)), spec, (n, k), torch.float32)
    prepared = kernel.layout.prepare(parts)
    size = sum(part.numel() * part.element_size() for part in prepared)
    copies = [prepared, *([part.clone() for part in prepared] for _ in range(_copies(size, bench) - 1))]
    products = [lambda x, copy=copy: kernel.call(*kernel.arguments(x, copy, [])) for copy in copies]
    bound = MORE_ERROR[act] * (8 if dtype == torch.bfloat16 and act == "float" else 1)
    label = name if act == "float" else f"{name} {act}"
    return Candidate(label, products, exact, size, bound)


def _copies(size: int, bench: Bench) -> int:
    return 1 if bench.is_rehearsal else max(2, min(32, -(-L2_BYTES // size)))


def dense_candidate(weight: Tensor, dtype: torch.dtype, bench: Bench) -> Candidate:
    """cuBLAS in 16 bits."""
    dense = weight.to(dtype)
    size = 2 * weight.numel()
    copies = [dense, *(dense.clone() for _ in range(_copies(size, bench) - 1))]
    products = [lambda x, copy=copy: torch.nn.functional.linear(x, copy) for copy in copies]
    return Candidate(f"cuBLAS {str(dtype).removeprefix('torch.')}", products, dense.float(), size, 1e-2)


def other_candidates(n: int, k: int, dtype: torch.dtype, bench: Bench) -> Iterator[Candidate]:
    """What others have for 4 bits. They are checked against the weight that they say they hold."""
    for make in (_torch_int4, _gemlite, _bitsandbytes):
        try:
            made = make(n, k, dtype, bench)
        except Exception as error:  # a package that is missing, or that does not like this GPU
            print(f"  {make.__name__[1:]}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if made is not None:
            yield made


def _torch_int4(n: int, k: int, dtype: torch.dtype, bench: Bench) -> Candidate | None:
    if bench.is_rehearsal or dtype != torch.bfloat16:
        return None
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int32)
    pairs = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    scale = torch.rand(k // 128, n, 2, device="cuda", dtype=dtype) * 0.01
    grouped = (codes.float() - 8).view(n, -1, 128) * scale[..., 0].T[..., None].float()
    exact = (grouped + scale[..., 1].T[..., None].float()).view(n, k)
    copies = [(pairs, scale), *((pairs.clone(), scale.clone()) for _ in range(_copies(n * k // 2, bench) - 1))]
    products = [lambda x, c=c: torch.ops.aten._weight_int4pack_mm(x, c[0], 128, c[1]) for c in copies]
    return Candidate("torch int4 g128", products, exact, n * k // 2 + scale.numel() * 2, 2e-2)


def _gemlite(n: int, k: int, dtype: torch.dtype, bench: Bench) -> Candidate | None:
    if bench.is_rehearsal:
        return None
    import gemlite  # type: ignore[import-not-found]

    layer = gemlite.GemLiteLinear(
        4, group_size=128, in_features=k, out_features=n, input_dtype=gemlite.DType.FP16,
        output_dtype=gemlite.DType.FP16,
    )  # fmt: skip
    if dtype != torch.float16:
        return None
    codes = torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8)
    scale = torch.rand(n * k // 128, 1, device="cuda", dtype=dtype) * 0.01 + 0.005
    zero = torch.full_like(scale, 8)
    layer.pack(codes, scale, zero, bias=None)
    exact = ((codes.view(-1, 128).float() - 8) * scale.float()).view(n, k)
    return Candidate("gemlite int4 g128", [layer] * 2, exact, n * k // 2, 1e-2)


def _bitsandbytes(n: int, k: int, dtype: torch.dtype, bench: Bench) -> Candidate | None:
    if bench.is_rehearsal:
        return None
    import bitsandbytes.functional as bnb

    weight = torch.randn(n, k, device="cuda", dtype=dtype) * 0.02
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    import bitsandbytes

    exact = bnb.dequantize_4bit(packed, state).float()
    product: Product = lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)  # noqa: E731
    return Candidate("bitsandbytes nf4 g64", [product] * 2, exact, n * k // 2, 2e-2)


# -------------------------------------------------------------------- measuring


def measure(shape: str, candidate: Candidate, dtype: torch.dtype, rows: list[int], bench: Bench) -> Iterator[Row]:
    """Check and time a candidate for every number of rows."""
    n, k = candidate.exact.shape
    for count in rows:
        if bench.is_late:
            return
        x = torch.randn(count, k, device=bench.device, dtype=torch.float32).to(dtype)
        got = candidate.products[0](x)
        exact = x[:64].double() @ candidate.exact.double().T
        error = float((got[:64].double() - exact).norm() / exact.norm())
        if not error < candidate.bound:
            print(f"  {candidate.name}, {count} rows: WRONG, error {error:.1e}")
            yield Row(shape, candidate.name, count, error, float("nan"), float("nan"), float("nan"))
            continue
        seconds = bench.seconds(candidate.products, x)
        limit = (candidate.bytes + 2 * count * (n + k)) / bench.bandwidth
        yield Row(shape, candidate.name, count, error, 1e6 * seconds, limit / seconds, float("nan"))


def run(given: argparse.Namespace) -> list[Row]:
    """All measurements."""
    bench = Bench(given.rehearse, given.minutes)
    dtype = torch.bfloat16 if given.bfloat16 else torch.float16
    shapes = TINY if given.rehearse else SHAPES
    rows = [1, 3, 16] if given.rehearse else [m for m in ROWS if not given.quick or m in (1, 16, 1024)]
    ours = OURS[:1] if given.quick else OURS
    results: list[Row] = []
    for shape, (n, k) in shapes.items():
        print(f"{shape}: {n} x {k}", flush=True)
        first = our_candidate(*ours[0], n, k, dtype, bench)
        assert first is not None, "no Triton target: is Triton installed, and a GPU at hand?"
        dense = list(measure(shape, dense_candidate(first.exact, dtype, bench), dtype, rows, bench))
        baseline = {row.rows: row.microseconds for row in dense}
        found = [*dense, *measure(shape, first, dtype, rows, bench)]
        for candidate in other_candidates(n, k, dtype, bench):
            found += measure(shape, candidate, dtype, rows, bench)
        for name, act in ours[1:]:
            if not bench.is_late:
                made = our_candidate(name, act, n, k, dtype, bench)
                found += [] if made is None else measure(shape, made, dtype, rows, bench)
        for row in found:
            speedup = baseline.get(row.rows, float("nan")) / row.microseconds
            results.append(Row(**{**asdict(row), "speedup": speedup}))
            print(f"  {row.kernel:28s} {row.rows:5d} rows {row.microseconds:9.1f} us  {row.limit:5.2f} of the limit  "
                  f"{speedup:5.2f} x  error {row.error:.1e}", flush=True)  # fmt: skip
    if bench.is_late:
        print("the time was spent before everything was measured")
    return results


def plot(results: list[Row], path: Path) -> None:
    """Speed-up over 16 bits against rows, one panel for each shape."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row.shape for row in results))
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(4.5 * len(shapes), 4), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        of_shape = [row for row in results if row.shape == shape]
        for kernel in dict.fromkeys(row.kernel for row in of_shape):
            line = [row for row in of_shape if row.kernel == kernel]
            panel.plot([row.rows for row in line], [row.speedup for row in line], marker=".", label=kernel)
        best = [row for row in of_shape if row.kernel == OURS[0][0]]
        panel.plot([row.rows for row in best], [row.speedup / row.limit for row in best], "k:", label="memory limit")
        panel.set(title=shape, xlabel="rows", ylabel="speed-up over 16 bits", xscale="log", ylim=(0, 5))
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one format, three numbers of rows")
    parser.add_argument("--bfloat16", action="store_true", help="activations in bfloat16 instead of float16")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter, on the CPU")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if given.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("no GPU; --rehearse runs tiny shapes on the CPU")
    import triton

    device = "rehearsal" if given.rehearse else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}")
    results = run(given)
    if given.json:
        about = {"device": device, "torch": torch.__version__, "triton": triton.__version__,
                 "date": date.today().isoformat()}  # fmt: skip
        given.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in results]}, indent=1) + "\n")
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
