"""Calibrated quantization whatever the model: one graph, several, none; and what is said about each."""

import pytest
import torch
from torch import nn

import ptqc
from ptqc.errors import PtqcError
from ptqc.passes.transforms.smoothquant import SmoothQuant
from ptqc.qtensor import QuantTensor
from tests.tiny import IDS, logits, tiny


class Perceptron(nn.Module):
    """Nothing of transformers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Broken(Perceptron):
    """A graph break in the middle, and a branch that the data chooses."""

    def forward(self, x):
        h = torch.relu(self.up(self.norm(x)))
        if h.sum().item() > 1e9:
            return x
        return x + self.down(h)


class Untraceable(Perceptron):
    """Dynamo is told to keep out."""

    def forward(self, x):
        return torch._dynamo.disable(super().forward)(x)


class Convolutional(nn.Module):
    """A convolutional network with a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 32)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))).mean((2, 3)))


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))


def quantized(model, method="gptq", batches=None, **options):
    """The model, what it said before, and the report."""
    data = batches if batches is not None else [{"x": X}, {"x": -X}]
    with torch.no_grad():
        before = model(**data[0])
    ptqc.quantize(model, method, calibration=data, progress=False, **options)
    return before, ptqc.report_of(model)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", ["hadamard", "gptq"]])
@pytest.mark.parametrize("kind", [Perceptron, Broken, Untraceable])
def test_every_route_quantizes_and_says_which_it_was(seeded, kind, method):
    model = kind().eval()
    before, report = quantized(model, method)
    routes = {Perceptron: "one graph, in pieces", Broken: "graphs", Untraceable: ""}
    assert routes[kind] in report.route
    assert isinstance(model.up.weight, QuantTensor) and isinstance(model.down.weight, QuantTensor)
    with torch.no_grad():
        assert 0 < distance(model(X), before) < 0.2


def test_a_graph_break_is_reported_with_its_reason(seeded):
    _, report = quantized(Broken().eval())
    assert any("graphs" in line and "statistics are those of the float model" in line for line in report.notes)


def test_groups_do_not_cross_a_graph_break(seeded):
    model = Broken().eval()
    before, report = quantized(model, [SmoothQuant(is_held=False), "rtn"], bits=8, activation="int8-token")
    done = {outcome.group.names: outcome.done for outcome in report.groups}
    assert done["up.weight",] == "folded" and done["down.weight",] == "run-time"
    with torch.no_grad():
        assert distance(model(X), before) < 0.02


def test_nothing_is_smoothed_where_inputs_stay_in_float(seeded):
    model = Perceptron().eval()
    gain = model.norm.weight.clone()
    _, report = quantized(model, ["smoothquant", "rtn"], bits=8)
    assert {outcome.done for outcome in report.groups} == {"left"}
    assert any("need no smoothing" in line and "int8-token" in line for line in report.notes)
    assert torch.equal(model.norm.weight, gain)


def test_every_fold_was_checked(seeded):
    _, report = quantized(Perceptron().eval(), [SmoothQuant(is_held=False), "rtn"], bits=8, activation="int8-token")
    assert {outcome.done for outcome in report.groups} == {"folded"}
    assert all(outcome.error is not None and outcome.error <= 1e-9 for outcome in report.groups)


def test_batches_of_several_shapes_are_observed_at_once(seeded):
    model = Perceptron().eval()
    before, report = quantized(model, batches=[{"x": X}, {"x": X[:40]}])
    assert report.route == "one graph, at once"
    assert any("differ in shape" in line for line in report.notes)
    with torch.no_grad():
        assert distance(model(X), before) < 0.2


def test_a_convolutional_network_keeps_its_convolutions(seeded):
    model = Convolutional().eval()
    images = torch.randn(40, 3, 16, 16)
    before, _ = quantized(model, batches=[{"x": images}], group_size=16)
    assert isinstance(model.head.weight, QuantTensor) and not isinstance(model.stem.weight, QuantTensor)
    with torch.no_grad():
        assert distance(model(images), before) < 0.2


def test_encoder_and_decoder_are_calibrated_in_pieces():
    model = tiny("mixed")
    expected = logits(model)
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    ptqc.quantize(model, "gptq", calibration=[batch, batch, batch], progress=False)
    assert ptqc.report_of(model).route == "one graph, in pieces"
    assert distance(logits(model), expected) < 0.5


def test_starved_experts_are_quantized_without_data_and_counted():
    model = tiny("experts")
    ptqc.quantize(model, "gptq", calibration=[IDS], progress=False, group_size=32)
    report = ptqc.report_of(model)
    assert any("experts saw under" in line for line in report.notes)
    assert all(len(rows) == 4 and sum(rows) == 32 for rows in report.coverage.values()) and report.coverage


def test_the_same_data_gives_the_same_bytes():
    one, other = (tiny("plain") for _ in range(2))
    for model in (one, other):
        ptqc.quantize(model, "awq", calibration=[IDS, IDS + 1, IDS + 2], progress=False)
    assert torch.equal(logits(one), logits(other))


def test_a_failure_leaves_the_model_as_it_was(seeded):
    model = Perceptron().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PtqcError, match="group 48"):
        quantized(model, ["smoothquant", "rtn"], spec="int4g48", activation="int8-token")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_method_with_needs_asks_for_data(seeded):
    with pytest.raises(PtqcError, match="calibration"):
        ptqc.quantize(Perceptron(), "gptq", progress=False)


def test_a_compiled_model_agrees_with_eager(seeded):
    model = Perceptron().eval()
    quantized(model, ["hadamard", "gptq"])
    with torch.no_grad():
        expected = model(X)
        assert distance(torch.compile(model, backend="ptqc", options={"exact": True})(X), expected) < 1e-4


def test_weights_that_the_spec_cannot_hold_are_reported(seeded):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept, self.small, self.wide = nn.Linear(20, 64), nn.Linear(20, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.wide(torch.relu(self.small(x) + self.kept(x)))

    model = Narrow().eval()
    rules = [{"pattern": "kept*", "method": "none"}, {"pattern": "*", "method": "quip_sharp", "bits": 2}]
    ptqc.quantize(model, recipe=rules, calibration=[{"x": torch.randn(64, 20)}], progress=False)
    skipped = ptqc.report_of(model).skipped
    assert list(skipped) == ["small.weight"] and "in_features 20" in skipped["small.weight"]
    assert isinstance(model.wide.weight, QuantTensor)
