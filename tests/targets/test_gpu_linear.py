"""The benchmark for GPUs, rehearsed in Triton's interpreter: every kernel it times is right, and it writes its rows."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_linear import OURS, TINY
from tests.targets.interpreted import needs_triton


def rehearse(tmp_path, *options):
    """The rows that a rehearsal writes."""
    root, file = Path(__file__).parents[2], tmp_path / "rows.json"
    settings = {"OMP_NUM_THREADS": "1", "CXX": "no-such-compiler", "PYTHONPATH": os.fspath(root)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_linear", "--rehearse", "--json", os.fspath(file), *options],
        env={**os.environ, **settings}, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "WRONG" not in done.stdout
    return json.loads(file.read_text())["rows"]


@needs_triton
def test_a_quick_rehearsal(tmp_path):
    rows = rehearse(tmp_path, "--quick")
    assert {(row["shape"], row["kernel"]) for row in rows} >= {(shape, "int4g128") for shape in TINY}
    assert all(math.isfinite(row["microseconds"]) for row in rows)


@needs_triton
@pytest.mark.slow
def test_a_whole_rehearsal(tmp_path):
    kernels = {row["kernel"] for row in rehearse(tmp_path)}
    assert {name if act == "float" else f"{name} {act}" for name, act in OURS} <= kernels
