"""Compiled encoders: byte for byte what NumPy gives, on every machine."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch

from ptqc.codegen.cpp.isa import ISAS, running_isa
from ptqc.codegen.cpp.toolchain import compile_library, compiler, missing_tools
from ptqc.codegen.export import _gguf_encode, _gguf_native
from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_cpp import FLAGS, encoder_source
from ptqc.codegen.export._gguf_encode import encode_weight
from ptqc.codegen.export._gguf_native import NativeEncoder, native_encoder
from ptqc.errors import ExportError

pytestmark = pytest.mark.skipif(missing_tools(compiler(), ISAS["portable"]) is not None, reason="no C++ compiler")
NAMES = [name for name, kind in TYPES.items() if kind.layout is not None]
ARM = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
MAIN = """
#include <cstdio>
#include <cstdlib>
int main(int, char **said) {  // files in and out; weights, blocks, blocks of a row, bytes out
    const long n = atol(said[3]), bytes = atol(said[6]);
    float *data = (float *)malloc((n + 512) * 4);
    uint8_t *out = (uint8_t *)malloc(bytes);
    if (fread(data, 4, n + 512, fopen(said[1], "rb")) != size_t(n + 512)) return 2;
    if (!encode(data, data + n, out, atol(said[4]), atol(said[5]))) return 3;
    FILE *file = fopen(said[2], "wb");
    fwrite(out, 1, bytes, file);
    return fclose(file);
}
"""
SOME = [("Q4_1", False), ("Q4_0", True), ("Q8_0", False), ("Q2_K", True), ("IQ4_XS", False), ("TQ1_0", True)]
"""One of each kind: integers, a search, steps, nested with minima, a table, digits."""
ALL = [(name, is_weighted) for name in NAMES for is_weighted in (False, True)]


def hard(rows, columns=512):
    """Normal weights, and blocks of every unpleasant kind."""
    rng = np.random.default_rng(0)
    found = (rng.standard_normal((rows, columns)) / 20).astype(np.float32)
    kinds = [
        np.zeros(32), np.full(32, 0.1), np.full(32, -0.1), np.arange(32) == 3, (np.arange(32) == 3) * -1e4,
        rng.standard_normal(32) * 1e-7, rng.standard_normal(32) * 1e-30, rng.standard_normal(32) * 1e-42,
        rng.integers(0, 2, 32) * 2e4 - 1e4, np.abs(rng.standard_normal(32)), rng.integers(-8, 8, 32) / 8,
        np.tile([0.5, 1.5, 2.5, -0.5], 8), rng.standard_cauchy(32).clip(-3e4, 3e4), np.full(32, -0.0),
    ]  # fmt: skip
    blocks = found.reshape(-1, 32)
    for place, block in enumerate(kinds * 3):
        if place * 7 < len(blocks):
            blocks[place * 7] = block
    return found


def importance(columns=512):
    return np.exp(np.random.default_rng(1).standard_normal(columns)).astype(np.float32)


def start(name, is_weighted, isa):
    """Begin to compile."""
    text = encoder_source(TYPES[name], is_weighted, isa)
    return NativeEncoder(TYPES[name], compile_library(text, (*isa.flags, *FLAGS)))


def agrees(encoder, name, is_weighted, rows):
    kind, weights = TYPES[name], hard(rows)
    counts = importance() if is_weighted else None
    out = np.full((rows, 512 // kind.weights * kind.nbytes), 0xAA, np.uint8)
    assert encoder.encode(weights, counts, out)
    expected = kind.encode(weights, counts)
    differing = np.flatnonzero((out != expected).reshape(-1, kind.nbytes).any(axis=1))
    assert differing.size == 0, f"blocks {differing[:5]}"


@pytest.fixture(scope="module")
def compiled():
    """What most tests need, compiling side by side."""
    return {case: start(*case, running_isa()) for case in SOME}


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 37])
def test_bytes_are_those_of_numpy(compiled, case, rows):
    agrees(compiled[case], *case, rows)


@pytest.mark.sweep
@pytest.mark.parametrize("isa", [name for name, isa in ISAS.items() if isa.needs <= running_isa().needs])
@pytest.mark.parametrize(("name", "is_weighted"), ALL)
def test_bytes_of_every_type_on_every_cpu(isa, name, is_weighted):
    encoder = start(name, is_weighted, ISAS[isa])
    for rows in (1, 2, 5, 64):
        agrees(encoder, name, is_weighted, rows)


@pytest.mark.parametrize("lanes", [4, pytest.param(16, marks=pytest.mark.sweep)])
def test_the_number_of_lanes_changes_nothing(lanes):
    isa = replace(ISAS["portable"], lanes=lanes)
    encoders = {name: start(name, name == "Q3_K", isa) for name in ("Q5_1", "Q3_K")}
    for name, encoder in encoders.items():
        agrees(encoder, name, name == "Q3_K", 11)


@pytest.mark.slow
@pytest.mark.skipif(ARM is None or QEMU is None, reason="needs g++-aarch64-linux-gnu and qemu-user-static")
@pytest.mark.parametrize(("name", "is_weighted"), [("Q4_1", False), ("Q2_K", True), ("TQ1_0", False), ("Q8_0", False)])
def test_bytes_on_another_cpu(name, is_weighted, tmp_path):
    kind, weights, counts = TYPES[name], hard(5), importance()
    (tmp_path / "text.cpp").write_text(encoder_source(kind, is_weighted, ISAS["neon"]) + MAIN)
    flags = ("-O2", "-std=c++17", "-static", "-w", *ISAS["neon"].flags, *FLAGS)
    subprocess.run([ARM, *flags, tmp_path / "text.cpp", "-o", tmp_path / "program"], check=True, timeout=300)
    (tmp_path / "in").write_bytes(weights.tobytes() + counts.tobytes())
    blocks, per_row = weights.size // kind.weights, 512 // kind.weights
    numbers = map(str, (weights.size, blocks, per_row, blocks * kind.nbytes))
    files = (tmp_path / "program", tmp_path / "in", tmp_path / "out")
    subprocess.run([QEMU, "-cpu", "max", *files, *numbers], check=True, timeout=300)
    expected = kind.encode(weights, counts if is_weighted else None)
    assert (tmp_path / "out").read_bytes() == expected.tobytes()


def test_weights_that_are_no_numbers_or_too_large_are_noticed(compiled):
    kind, encoder = TYPES["Q4_1"], compiled["Q4_1", False]
    out = np.zeros((2, 512 // 32 * kind.nbytes), np.uint8)
    for bad in (np.nan, np.inf, -np.inf, 3e38, kind.largest * 1.01, -kind.largest * 1.01):
        weights = hard(2)
        weights[1, 77] = bad
        assert not encoder.encode(weights, None, out)
    weights[1, 77] = kind.largest
    assert encoder.encode(weights, None, out)


def test_large_weights_are_encoded_by_it(monkeypatch):
    monkeypatch.setattr(_gguf_encode, "_WORTH_COMPILING", 1)
    monkeypatch.setattr(_gguf_encode, "_WORTH_WAITING", 1)
    monkeypatch.setattr(_gguf_encode, "_NATIVE_AT_ONCE", 2048)
    calls, own = [], NativeEncoder.encode
    monkeypatch.setattr(NativeEncoder, "encode", lambda self, *rest: calls.append(1) or own(self, *rest))
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.from_numpy(hard(9)).to(dtype)
        found = encode_weight(weight, TYPES["Q4_1"], "w")
        assert np.array_equal(found, TYPES["Q4_1"].encode(weight.float().numpy(), None))
    assert len(calls) >= 6  # pieces of four rows at most
    turned = torch.from_numpy(hard(9)).T.contiguous().T
    assert np.array_equal(encode_weight(turned, TYPES["Q4_1"], "w"), TYPES["Q4_1"].encode(hard(9), None))
    weight[3, 3] = float("nan")
    with pytest.raises(ExportError, match='"w" holds NaN or infinite values'):
        encode_weight(weight, TYPES["Q4_1"], "w")


def test_what_cannot_be_compiled_is_encoded_by_numpy(monkeypatch, caplog):
    monkeypatch.setattr(_gguf_encode, "_WORTH_COMPILING", 1)
    monkeypatch.setattr(_gguf_encode, "_WORTH_WAITING", 1)
    monkeypatch.setattr(_gguf_native, "encoder_source", lambda *_: "no C++")
    native_encoder.cache_clear()
    weight = torch.from_numpy(hard(4))
    assert np.array_equal(encode_weight(weight, TYPES["Q8_0"], "w"), TYPES["Q8_0"].encode(hard(4), None))
    assert "GGUF types are encoded by NumPy" in caplog.text
    native_encoder.cache_clear()


def test_small_weights_and_floats_compile_nothing(monkeypatch):
    monkeypatch.setattr(_gguf_encode, "native_encoder", lambda *_: pytest.fail("asked for a compiled encoder"))
    assert encode_weight(torch.ones(4, 256), TYPES["Q4_K"], "w").shape == (4, 144)
    assert native_encoder("F16", False) is None and native_encoder("BF16", True) is None
