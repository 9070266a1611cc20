"""Observing a model: the three routes, shared code, changing shapes, and what is left as it was."""

import logging

import pytest
import torch
from torch import nn

from ptqc.errors import PtqcError
from ptqc.passes.observe.run import observe
from tests.observe._models import rows


class Block(nn.Module):
    def __init__(self, does_break=False):
        super().__init__()
        self.up, self.down, self.does_break = nn.Linear(16, 32), nn.Linear(32, 16), does_break

    def forward(self, x):
        y = torch.relu(self.up(x))
        if self.does_break:
            torch._dynamo.graph_break()
        return x + self.down(y)


class Model(nn.Module):
    def __init__(self, layers=3, does_break=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(does_break) for _ in range(layers))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        for block in self.blocks:
            x = self.dropout(block(x))
        return x


BATCHES = [{"x": rows(2, 6 + n, 16, seed=n)} for n in range(4)]


def expected(model):
    """The second moments of the inputs of every linear, by its weight."""
    sums = {}

    def hook(module, arguments):
        flat = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
        total, count = sums.get(module.weight, (0, 0))
        sums[module.weight] = (total + flat.T @ flat, count + len(flat))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {weight: (total / count).float() for weight, (total, count) in sums.items()}


def check(model, wanted=None):
    reference = expected(model.eval())
    recorder = observe(model, BATCHES, wanted or {weight: {"hessian", "count"} for weight in reference})
    for weight in recorder.parameters:
        found = recorder.statistics(weight)
        torch.testing.assert_close(found["hessian"], reference[weight], rtol=1e-4, atol=1e-5)
        assert float(found["count"]) == 2 * (6 + 7 + 8 + 9)
        assert recorder.reason(weight) is None
    return recorder


@pytest.mark.parametrize("does_break", [False, True])
def test_graphs_with_and_without_breaks(does_break, caplog):
    caplog.set_level(logging.INFO, "ptqc")
    check(Model(does_break=does_break))
    assert "observed 4 batch(es) through" in caplog.text


def test_modules_that_share_compiled_code_keep_their_own_statistics():
    model = Model(does_break=True)
    one = model.blocks[1].down.weight
    check(model, {one: {"hessian", "count"}})


def test_hooks_where_dynamo_fails(monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("unsupported\nmore")

    monkeypatch.setattr(torch, "compile", fails)
    check(Model())
    assert "observing by module hooks, since dynamo fails: RuntimeError: unsupported" in caplog.text


def test_hooks_complete_what_graphs_do_not_show(caplog):
    caplog.set_level(logging.INFO, "ptqc")
    model = Model()
    model.blocks[1].forward = torch.compiler.disable(model.blocks[1].forward)
    check(model)
    assert "2 weight(s) that no graph shows by module hooks" in caplog.text


def test_what_is_not_reached_is_said(caplog):
    model = Model()
    unused = nn.Parameter(torch.zeros(8, 8))
    recorder = observe(model, BATCHES, {unused: {"hessian"}, model.blocks[0].up.weight: {"hessian"}})
    assert recorder.reason(unused) == "no matrix product that reads it was seen"
    assert "1 weight(s) not observed" in caplog.text


def test_the_model_is_as_before_and_progress_is_told():
    model, told = Model().train(), []
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (
        observe(model, BATCHES, {model.blocks[2].up.weight: {"rows"}}, progress=lambda *done: told.append(done))
        for _ in range(2)
    )
    assert model.training and not model.blocks[0].training and model.blocks[1].up.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)] * 2
    assert all(torch.equal(a.statistics(w)["rows"], b.statistics(w)["rows"])
               for a, b, w in [(first, second, model.blocks[2].up.weight)])  # fmt: skip


def test_no_data_is_an_error():
    with pytest.raises(PtqcError, match="no calibration data"):
        observe(Model(), [], {})


def test_errors_of_the_model_are_the_users():
    with pytest.raises(RuntimeError, match="shape"):
        observe(Model(), [{"x": rows(2, 3, 15)}], {})
