"""The log of kernels and its table: what was chosen, what refused, and by which weight."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from ptqc import backend, kernel_log
from tests.lower._everything import everything, targets  # noqa: F401
from tests.lower._weights import Net, linear


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    monkeypatch.setattr(backend, "compile_fx", lambda module, inputs, config_patches=None: module)
    torch._dynamo.reset()


def compiled(model, **options):
    run = torch.compile(model, backend="ptqc", options=options or None)
    with torch.no_grad():
        for rows in (3, 5):
            run(torch.randn(rows, 64))
    return model


def test_the_table_knows_weights_that_the_backend_stored(everything):  # noqa: F811
    model = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32, bias=False))
    compiled(model, method="rtn", group_size=32)
    first, second = backend.chosen_kernels(model)
    assert (first.names, first.request.epilogue, first.kernel.target) == (("0.weight",), ("bias", "silu"), "everything")
    assert second.names == ("2.weight",) and not second.request.exact
    assert "2.weight" in backend.kernel_table(model) and "product > bias" in backend.kernel_table(model)


def test_one_line_for_each_site(everything, caplog):  # noqa: F811
    everything.refused = ("silu",)
    model = Net(lambda net, x: nn.functional.silu(net.a(x)), a=linear(64, 32))
    with caplog.at_level(logging.INFO, logger="ptqc.kernels"):
        compiled(model, exact=True)
    lines = {record.getMessage() for record in caplog.records if record.name == "ptqc.kernels"}
    assert lines == {"a.weight: int4g32 [32, 64] float32 cpu exact: product -> everything; "
                     "not fused: silu (everything: no silu)"}  # fmt: skip
    assert len(backend.chosen_kernels(model)) == 1


def test_refusals_are_told():
    with targets():
        model = compiled(Net(lambda net, x: net.a(x), a=linear(64, 32)))
    assert backend.kernel_table(model).count("reference") == 1
    model = compiled(Net(lambda net, x: net.a(x), a=linear(64, 32)))
    ((name, reason), *_) = backend.chosen_kernels(model)[0].kernel.refusals
    assert f"{name}: {reason}"[:30] in str(backend.chosen_kernels(model)[0])


def test_another_model_has_no_kernels():
    assert backend.chosen_kernels(nn.Linear(64, 64)) == []


def test_the_environment_turns_it_on():
    code = (
        "import torch; m = torch.nn.Linear(64, 64).eval(); import ptqc.backend\n"
        "ptqc.backend.compile_fx = lambda module, inputs, config_patches=None: module\n"
        "options = {'method': 'rtn', 'bits': 4}\n"
        "with torch.no_grad(): torch.compile(m, backend='ptqc', options=options)(torch.ones(2, 64))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PTQC_LOGS": "kernels"}
    )
    assert done.returncode == 0, done.stderr
    assert "ptqc.kernels: weight: int4 [64, 64] float32 cpu: product > bias -> " in done.stderr


def test_asking_twice_prints_once(monkeypatch):
    monkeypatch.setenv("PTQC_LOGS", "nothing, nothing")
    kernel_log.log_as_asked()
    kernel_log.log_as_asked()
    assert len(logging.getLogger("ptqc.nothing").handlers) == 1
