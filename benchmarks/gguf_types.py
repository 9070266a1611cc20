"""Are our encoders of GGUF types as good and as fast as llama.cpp's?

Weights: all matrices of the reference model whose rows are whole superblocks. Importance: the mean square of their
inputs on calibration text, the same for both sides. Error: sum of importance times squared difference (importance 1
without), decoded by the `gguf` package; the ratio is ours over that of llama.cpp, mean over matrices, and the worst
matrix. Speed: millions of weights a second by the clock, of a normal matrix of 4 million weights on all cores: the
shortest of several calls.
llama.cpp does not search scales of Q4_0, Q4_1, Q5_0, Q5_1 without importance, nor of TQ1_0, TQ2_0 ever. Our encoders
are compiled first; both sides take turns on the machine.

    python -m benchmarks.gguf_types [--json gguf_types.json]
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks._side_llama_cpp import encode as theirs
from benchmarks.gguf_llamacpp import REFERENCE
from ptqc.channel_importance import importance
from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_encode import encode_weight
from ptqc.codegen.export._gguf_native import native_encoder

Floats = NDArray[np.float32]
_REPEATS, _SECONDS = 3, 1.0


def error(encoded: NDArray[np.uint8], weights: Floats, name: str, counted: Floats | None) -> float:
    """The weighted squared error."""
    left = np.square(gguf.quants.dequantize(encoded, GGMLQuantizationType[name]) - weights, dtype=np.float64)
    return float((left if counted is None else left * counted).sum())


def seconds(*encoders: Callable[[], object]) -> list[float]:
    """The shortest time of each, by the clock, of several calls in turn."""
    times: list[list[float]] = [[] for _ in encoders]
    started = time.perf_counter()
    while len(times[0]) < _REPEATS or time.perf_counter() - started < _SECONDS:
        for encode, own in zip(encoders, times, strict=True):
            start = time.perf_counter()
            encode()
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


def row(name: str, matrices: dict[str, tuple[Floats, Floats]], sample: Floats) -> dict[str, object]:
    """One type: ratios and speeds, without and with importance."""
    found: dict[str, object] = {"type": name, "bits": TYPES[name].bits_per_weight}
    for label in ("without", "with"):
        native = native_encoder(name, label == "with")
        if native is not None:
            native.wait()
        ratios = []
        for weights, counts in matrices.values():
            each = counts if label == "with" else None
            ours = encode_weight(torch.from_numpy(weights), TYPES[name], name, each)
            ratios.append(error(ours, weights, name, each) / error(theirs(weights, name, each), weights, name, each))
        flat = np.ones(sample.shape[1], np.float32) if label == "with" else None
        tensor = torch.from_numpy(sample)
        own, peer = seconds(
            lambda tensor=tensor, flat=flat: encode_weight(tensor, TYPES[name], name, flat),
            lambda flat=flat: theirs(sample, name, flat),
        )
        found |= {
            f"ratio_{label}": float(np.mean(ratios)), f"worst_{label}": float(np.max(ratios)),
            f"speed_{label}": sample.size / own / 1e6, f"their_speed_{label}": sample.size / peer / 1e6,
        }  # fmt: skip
    return found


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*", default=[name for name, kind in TYPES.items() if kind.spec is not None])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
    counts = importance(model, "docs", AutoTokenizer.from_pretrained(REFERENCE), samples=arguments.samples)
    matrices = {
        name: (model.get_parameter(name).detach().numpy(), value.numpy() / float(value.mean()))
        for name, value in counts.items()
        if model.get_parameter(name).shape[1] % 256 == 0
    }
    sample = (np.random.default_rng(0).standard_normal((2048, 2048)) / 20).astype(np.float32)
    rows = []
    print(f"{'':7} {'bits':>6}  error without, with importance (worst)      Mweights/s without: ours, theirs; with")
    for name in arguments.types:
        found = row(name, matrices, sample)
        rows.append(found)
        print(
            f"{name:7} {found['bits']:6.4g}  {found['ratio_without']:.3f} ({found['worst_without']:.3f})   "
            f"{found['ratio_with']:.3f} ({found['worst_with']:.3f})   {found['speed_without']:7.1f} "
            f"{found['their_speed_without']:7.1f}   {found['speed_with']:7.1f} {found['their_speed_with']:7.1f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": platform.platform(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
