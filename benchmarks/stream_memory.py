"""Peak memory of quantizing a model from disk: does it stay below 1.3 x the larger of (input shard, output)?

Writes a Llama-shaped model of about a billion random bfloat16 parameters to a temporary folder, once sharded and once
as a single file, runs `ptqc quantize` on each in a process of its own, and reads its peak resident memory (VmHWM).

    python -m benchmarks.stream_memory [--spec int4g64] [--include-head] [--json FILE]

With --calibrated it is a model of the same layers and 32000 tokens, quantized by a method that needs data, on two
windows of 512 tokens: the peak must stay below 2.5 GB, while the model takes 2.1 GB in bfloat16 and twice that as it
is computed with.

    python -m benchmarks.stream_memory --calibrated gptq awq [--layers 16]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ptqc.folders.shards import Append, Block, assign_shards, write_shards

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, HEADS, KEY_VALUE_HEADS = 2048, 8192, 16, 128256, 32, 8
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LIMIT = 1.3
CALIBRATED_LIMIT_BYTES = 2.5e9
CALIBRATED_VOCABULARY, SAMPLES, WINDOW = 32000, 2, 512


def shapes(vocabulary: int = VOCABULARY, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, the output head tied to the embedding."""
    narrow = HIDDEN // HEADS * KEY_VALUE_HEADS
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (narrow, HIDDEN),
        "self_attn.v_proj.weight": (narrow, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    named = {"model.embed_tokens.weight": (vocabulary, HIDDEN), "model.norm.weight": (HIDDEN,)}
    return named | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}


def random_tensor(name: str, shape: tuple[int, ...]) -> Block:
    """A tensor that is made when it is written."""

    def produce(append: Append) -> None:
        generator = torch.Generator().manual_seed(hash(shape) % 2**31)
        if len(shape) == 1:
            append(name, torch.ones(shape, dtype=torch.bfloat16))
            return
        rows = torch.empty(max(1, 2**22 // shape[-1]), shape[-1]).normal_(0, 0.02, generator=generator).bfloat16()
        for start in range(0, shape[0], len(rows)):
            append(name, rows[: shape[0] - start])

    return Block(name, {name: (shape, torch.bfloat16)}, produce)


def write_model(folder: Path, max_shard_bytes: float, vocabulary: int = VOCABULARY, layers: int = LAYERS) -> None:
    """Write the model; no more than 16 MB of it are in memory."""
    folder.mkdir()
    config = CONFIG | {"vocab_size": vocabulary, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    blocks = [random_tensor(name, shape) for name, shape in shapes(vocabulary, layers).items()]
    write_shards(folder, assign_shards(blocks, max_shard_bytes))


COMMAND = """
import sys
from pathlib import Path
from ptqc.cli import main

try:
    main()
finally:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
"""


def measure(source: Path, out: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run `ptqc quantize` in a process of its own. Returns bytes, seconds and the ratio to hold against the limit."""
    options = ["--method", arguments.method, "--spec", arguments.spec, "--json"]
    if arguments.include_head:
        options += [word for pattern in ("*proj*", "lm_head", "embed_tokens") for word in ("--include", pattern)]
    began = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, "quantize", str(source), "--out", str(out), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if run.returncode:
        raise SystemExit(run.stderr)
    peak = int(run.stderr.rpartition("peak ")[2])
    input_bytes = [file.stat().st_size for file in source.glob("*.safetensors")]
    output_bytes = sum(file.stat().st_size for file in out.iterdir())
    allowed = max(*input_bytes, output_bytes)
    return {
        "input_files": len(input_bytes),
        "input_bytes": sum(input_bytes),
        "largest_shard_bytes": max(input_bytes),
        "output_bytes": output_bytes,
        "peak_bytes": peak,
        "ratio": peak / allowed,
        "both_models_bytes": sum(input_bytes) + output_bytes,
        "seconds": round(seconds, 1),
    }


CALIBRATED = """
import sys
from pathlib import Path
import torch
from ptqc.folders.calibrated import quantize_folder_calibrated
from ptqc.recipe import make_rule

source, out, method, samples, window, vocabulary = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
ids = torch.randint(int(vocabulary), (int(samples), 1, int(window)), generator=generator)
quantize_folder_calibrated(
    source, out, recipe=[make_rule("*", method)], batches=[{"input_ids": row} for row in ids], overwrite=True,
    on_progress=lambda done, total, what: print(f"{done / total:.4f} {what}", flush=True),
)
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
"""


def calibrated_command(source: Path, out: Path, method: str) -> list[str]:
    """The command that quantizes `source` with calibration data, in a process of its own."""
    numbers = [str(SAMPLES), str(WINDOW), str(CALIBRATED_VOCABULARY)]
    return [sys.executable, "-W", "ignore", "-c", CALIBRATED, str(source), str(out), method, *numbers]


def measure_calibrated(source: Path, out: Path, method: str) -> dict[str, float]:
    """Bytes and seconds of a calibrated run."""
    began = time.perf_counter()
    run = subprocess.run(calibrated_command(source, out, method), capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(run.stderr)
    return {
        "input_bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "output_bytes": sum(file.stat().st_size for file in out.iterdir()),
        "peak_bytes": int(run.stderr.rpartition("peak ")[2]),
        "seconds": round(time.perf_counter() - began, 1),
    }


def run_calibrated(methods: list[str], layers: int, file: Path | None) -> None:
    """Measure each method on one model, and hold its peak against the limit."""
    folder = Path(tempfile.mkdtemp(prefix="ptqc-stream-"))
    try:
        write_model(folder / "source", 1e9, CALIBRATED_VOCABULARY, layers)
        rows = {method: measure_calibrated(folder / "source", folder / "out", method) for method in methods}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("method       input GB output GB  peak GB  limit      s")
    for method, row in rows.items():
        numbers = [row[key] / 1e9 for key in ("input_bytes", "output_bytes", "peak_bytes")]
        cells = "".join(f"{value:{width}.3f} " for value, width in zip(numbers, (8, 9, 8), strict=True))
        print(f"{method:12} {cells}{CALIBRATED_LIMIT_BYTES / 1e9:6.2f} {row['seconds']:6.1f}")
    if file is not None:
        figures = {"limit_bytes": CALIBRATED_LIMIT_BYTES, "layers": layers, "methods": rows}
        file.write_text(json.dumps(figures, indent=2) + "\n")
    if any(row["peak_bytes"] >= CALIBRATED_LIMIT_BYTES for row in rows.values()):
        raise SystemExit("the peak is above the limit")


def baseline() -> int:
    """Peak of a process that only imports what is needed."""
    code = (
        "import ptqc.folders.stream, transformers\nfrom transformers import LlamaForCausalLM\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--spec", default="int4g64")
    parser.add_argument("--include-head", action="store_true", help="quantize embedding and output head as well")
    parser.add_argument("--shard-bytes", type=float, default=1e9, help="of the input's files where it is sharded")
    parser.add_argument("--variants", nargs="+", default=["sharded", "single"], choices=["sharded", "single"])
    parser.add_argument("--calibrated", nargs="+", metavar="METHOD", help="methods that need data, instead")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model of --calibrated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.calibrated:
        run_calibrated(arguments.calibrated, arguments.layers, arguments.json)
        return
    folder = Path(tempfile.mkdtemp(prefix="ptqc-stream-"))
    rows = {}
    try:
        for variant in arguments.variants:
            write_model(folder / variant, arguments.shard_bytes if variant == "sharded" else float("inf"))
            rows[variant] = measure(folder / variant, folder / f"{variant}-out", arguments)
            shutil.rmtree(folder / variant)
            shutil.rmtree(folder / f"{variant}-out")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    imports = baseline()
    print("variant  input GB shard GB output GB  peak GB  ratio  limit      s")
    for variant, row in rows.items():
        numbers = [row[key] / 1e9 for key in ("input_bytes", "largest_shard_bytes", "output_bytes", "peak_bytes")]
        cells = "".join(f"{value:{width}.3f} " for value, width in zip(numbers, (8, 8, 9, 8), strict=True))
        print(f"{variant:8} {cells}{row['ratio']:6.3f} {LIMIT:6.2f} {row['seconds']:6.1f}")
    print(f"imports alone take {imports / 1e9:.3f} GB of the peak")
    if arguments.json:
        arguments.json.write_text(json.dumps({"limit": LIMIT, "imports_bytes": imports, "variants": rows}, indent=2))
    if any(row["ratio"] >= LIMIT for row in rows.values()):
        raise SystemExit("the peak is above the limit")


if __name__ == "__main__":
    main()
