import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_demo_runs_and_its_checks_hold(tmp_path, request):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "benchmarks.demo", "--methods", "rtn:4", "--windows", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=request.config.rootpath)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 checks hold" in done.stdout
    assert [run["spec"] for run in json.loads((out / "results.json").read_text())["runs"]] == ["int4g64"]
    assert {"index.html", "plot.png", "reference-Q4_0.gguf", "reference-rtn-4.onnx"} <= {f.name for f in out.iterdir()}
