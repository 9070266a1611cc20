"""A Llama of about a billion parameters on disk -> Q4_K_M: peak memory and time, beside llama.cpp's own route.

Writes a Llama of random bfloat16 weights (`benchmarks.stream_memory`) with the reference model's tokenizer and runs
`ptqc export FOLDER gguf --quant Q4_K_M` in a process of its own; its peak resident memory (VmHWM) must stay below
1.5 GB. Beside it, in processes of their own, the two steps of llama.cpp: the file of float16 weights, and its quantizer
(llama_model_quantize of the package llama-cpp-python) on the same number of threads. The package has no converter, so
the first step is ours as well, `--quant F16`.

    python -m benchmarks.stream_gguf [--layers 16] [--vocabulary 128256] [--json FILE]
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import reference
from benchmarks.cpu_linear import cpu_name
from benchmarks.stream_memory import COMMAND, LAYERS, VOCABULARY, shapes, write_model

LIMIT_BYTES = 1.5e9
THEIRS = """
import ctypes, sys
from pathlib import Path
import llama_cpp

source, target, file_type, threads = sys.argv[1:]
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(file_type), int(threads)
silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)) == 0
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print("peak", int(line.split()[1]) * 1024, file=sys.stderr)
"""
Q4_K_M = 15
"""llama.cpp's number of the mix."""


def run(code: str, *arguments: object) -> dict[str, float]:
    """Peak memory and seconds, by the clock and of the cores, of a Python program in a process of its own."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    peak = int(done.stderr.rpartition("peak ")[2])
    return {"seconds": round(seconds, 1), "core_seconds": round(cores, 1), "peak_bytes": peak}


def measure(folder: Path, threads: int) -> dict[str, dict[str, float]]:
    """A row for each program, from the model in `folder` / "source"."""
    source, ours, half, theirs = (folder / name for name in ("source", "ours.gguf", "f16.gguf", "theirs.gguf"))
    rows = {}
    for name, quant, out in (("ptqc Q4_K_M", "Q4_K_M", ours), ("ptqc F16", "F16", half)):
        rows[name] = run(COMMAND, "export", source, "gguf", "--quant", quant, "--out", out)
        rows[name]["output_bytes"] = out.stat().st_size
    rows["llama.cpp F16 to Q4_K_M"] = run(THEIRS, half, theirs, Q4_K_M, threads)
    rows["llama.cpp F16 to Q4_K_M"]["output_bytes"] = theirs.stat().st_size
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--folder", type=Path, help="where the files are written, by default a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    folder = Path(tempfile.mkdtemp(prefix="ptqc-stream-", dir=arguments.folder))
    try:
        write_model(folder / "source", 1e9, arguments.vocabulary, arguments.layers)
        for file in reference.FOLDER.glob("tokenizer*"):
            shutil.copyfile(file, folder / "source" / file.name)
        input_bytes = sum(file.stat().st_size for file in (folder / "source").glob("*.safetensors"))
        rows = measure(folder, threads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{arguments.layers} layers, {input_bytes / 1e9:.2f} GB in bfloat16, {threads} threads")
    print("program                  output GB  peak GB       s  core s")
    for name, row in rows.items():
        sizes = f"{row['output_bytes'] / 1e9:9.3f} {row['peak_bytes'] / 1e9:8.3f}"
        print(f"{name:24} {sizes} {row['seconds']:7.1f} {row['core_seconds']:7.1f}")
    if arguments.json is not None:
        more = {
            "limit_bytes": LIMIT_BYTES, "input_bytes": input_bytes, "layers": arguments.layers, "cpu": cpu_name(),
            "vocabulary": arguments.vocabulary, "parameters": input_bytes // 2,
            "shapes": len(shapes(arguments.vocabulary, arguments.layers)), "quantizer_threads": threads,
        }  # fmt: skip
        reference.write(arguments.json, rows, **more)
    if rows["ptqc Q4_K_M"]["peak_bytes"] >= LIMIT_BYTES:
        raise SystemExit("the peak is above the limit")


if __name__ == "__main__":
    main()
