"""What Inductor is told of decoding on a GPU, and what comes of it: launches of a layer, counted without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from ptqc.passes.lower.few_launches import FEW_LAUNCHES, settings_for
from tests.targets.interpreted import needs_triton


def graph_on(device):
    graph = fx.Graph()
    node = graph.placeholder("x")
    with FakeTensorMode():
        node.meta["example_value"] = torch.empty(2, device=device)
    graph.output(node)
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("device", "lowered", "settings"), [("cuda", 2, FEW_LAUNCHES), ("cuda", 0, {}), ("cpu", 2, {})]
)
def test_decoding_on_a_gpu_is_told(device, lowered, settings):
    assert settings_for(graph_on(device), {"lower-attention": lowered, "emit-kernels": 3}) == settings


def test_inductor_knows_the_settings():
    with torch._inductor.config.patch(dict(FEW_LAUNCHES)):
        pass


@needs_triton
@pytest.mark.slow
def test_a_decoder_layer_launches_few_kernels_on_a_gpu(tmp_path):
    """Four products, two with a kernel for their norm, attention, rotary embedding with the caches, a counter."""
    root, file = Path(__file__).parents[2], tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.launches", "--device", "cuda", "--json", os.fspath(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.fspath(root)}, cwd=root,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["ptqc"], row["entries"], row["others"]) == (5, 2, 0)
    assert row["kernels"] <= 9
