"""A model that does not run on what it is given: one sentence, for calibration and evaluation alike."""

import pytest
import torch
from torch import nn

import ptqc.api as api
from ptqc.errors import PtqcError
from ptqc.evaluate import evaluate
from ptqc.misfit import does_not_run, positions_of
from tests.tiny import tiny

LONG = torch.arange(96)[None] % 64


def test_windows_longer_than_the_model_are_said_so(caplog):
    model = tiny("transposed")  # learned positions, 64 of them
    assert positions_of(model) == 64 and positions_of(nn.Linear(2, 2)) is None
    says = r"input_ids \(1, 96\)\): IndexError: .*; it has 64 positions, so use windows of at most 64 tokens"
    with pytest.raises(PtqcError, match=says):
        evaluate(model, LONG, window=96)
    assert "windows of 96 tokens are longer than the 64 positions of the model" in caplog.text
    with pytest.raises(PtqcError, match=says):
        api.quantize(model, "gptq", calibration=[LONG], progress=False)


def test_inputs_of_other_names_are_named():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(PtqcError, match=r"runs? on its inputs \(x \(2, 64\)\): TypeError: .*; give its inputs by the"):
        api.quantize(model, "gptq", calibration=[{"x": torch.randn(2, 64)}], progress=False)


def test_an_error_without_text_has_its_kind():
    assert str(does_not_run(nn.Linear(2, 2), {}, ValueError())).endswith("(no tensors): ValueError: ValueError")


def test_a_model_that_only_dynamo_refuses_is_quantized(monkeypatch, caplog):
    """Where bare matrices are read stays unknown; linears need no graph."""

    def fail(*_, **__):
        raise RuntimeError("not supported")

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bare = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return self.linear(x) @ self.bare

    monkeypatch.setattr("ptqc.sites.capture", fail)
    model = api.quantize(Mixed(), "rtn", calibration=[{"x": torch.randn(2, 64)}], progress=False)
    assert type(model.linear.weight).__name__ == "QuantTensor" and type(model.bare) is nn.Parameter
    assert "how 1 weights are used (bare) is unknown: dynamo cannot trace the model (not supported)" in caplog.text
