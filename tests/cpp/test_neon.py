"""NEON kernels on another CPU: cross-compiled, and run by qemu as a program that reads the arguments of one call."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from ptqc.codegen.cpp.isa import ISAS
from ptqc.codegen.cpp.source import plan, source
from tests.cpp._run import EXACT, QUANTIZED, case, error

COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
MAIN = """
#include <cstdio>
#include <cstdlib>
static char *blob(FILE *file) {
    long bytes;
    if (fread(&bytes, 8, 1, file) != 1) exit(2);
    char *data = (char *)aligned_alloc(64, bytes / 64 * 64 + 64);
    if (bytes && fread(data, bytes, 1, file) != 1) exit(3);
    return data;
}
int main(int, char **names) {
    FILE *in = fopen(names[1], "rb"), *out = fopen(names[2], "wb");
    const long *numbers = (const long *)blob(in);  // rows, bytes of the result, bytes of work, then sizes
    char *x = blob(in), *parts[4];
    for (char *&p : parts) p = blob(in);
    Operand operand = {blob(in), numbers[3]};
    void *y = malloc(numbers[1]), *work = malloc(numbers[2]);
    run(x, y, work, parts[0], parts[1], parts[2], parts[3], &operand, numbers + 4, numbers[0], 1);
    fwrite(y, numbers[1], 1, out);
    return fclose(out);
}
"""
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def emulate(made, folder):
    """Run a case with one operand for AArch64."""
    planned = plan(made.request, ISAS["neon"])
    text, program = folder / "kernel.cpp", folder / "kernel"
    text.write_text(source(planned) + MAIN)
    flags = ("-O2", "-std=c++17", "-fopenmp", "-static", "-w", *planned.isa.flags)
    subprocess.run([COMPILER, *flags, str(text), "-o", str(program)], check=True, timeout=300)
    layout, blocks, rows = planned.layout, planned.layout.blocks, made.x.shape[0]
    scratch = 2 * (blocks.k + 64)
    work = rows * (blocks.padded * 4 + blocks.count * 12) + 4 * scratch
    result = torch.empty(rows, made.request.width, dtype=made.x.dtype)
    sizes = (layout.n, blocks.k, blocks.group, blocks.groups, blocks.count, blocks.padded, layout.padded, scratch)
    numbers = torch.tensor([rows, result.nbytes, work, KINDS[made.operands[0].dtype], *sizes])
    with (folder / "in").open("wb") as file:
        for tensor in (numbers, made.x, *layout.prepare(made.parts), made.operands[0]):
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            file.write(np.int64(len(data)).tobytes() + data)
    files = [str(folder / name) for name in ("in", "out")]
    subprocess.run([QEMU, "-cpu", "max", str(program), *files], check=True, timeout=300)
    return torch.from_numpy(np.fromfile(folder / "out", dtype=np.uint8)).view(made.x.dtype).view(result.shape)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or QEMU is None, reason="needs g++-aarch64-linux-gnu and qemu-user-static")
@pytest.mark.parametrize(
    ("name", "dtype", "exact"),
    [("int4g32z", torch.float32, False), ("int8", torch.bfloat16, False), ("nf4g64", torch.float16, False),
     ("int2g24", torch.float32, False), ("nf4g64", torch.float16, True), ("fp8e4m3", torch.bfloat16, True)],
)  # fmt: skip
def test_neon(name, dtype, exact, tmp_path):
    made = case(name, 2 * 37, 24 * 16, rows=7, dtype=dtype, exact=exact, epilogue=("bias", "gate_silu"))
    assert error(emulate(made, tmp_path), made.expected()) < (EXACT[dtype] if exact else QUANTIZED)
