"""Running cases of Triton kernels in a process of their own, since Triton asks once how it is to run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["needs_triton", "run_interpreted"]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_interpreted(cases, module="tests.targets.triton_cases"):
    """What a module says to cases, in Triton's interpreter."""
    root = Path(__file__).parents[2]
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CXX": "no-such-compiler"}  # C++ would go first
    environment = {**os.environ, **settings, "PYTHONPATH": os.fspath(root)}
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(cases), env=environment, cwd=root,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
