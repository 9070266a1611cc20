"""lower-linears: each rule of the pass, what it leaves, and the values."""

import pytest
import torch
from torch import nn

from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from tests.lower._everything import reference  # noqa: F401
from tests.lower._graphs import lowered
from tests.surrounded import KINDS, surrounded

pytestmark = pytest.mark.usefixtures("reference")


def parameter(shape, is_transposed=False, name="int4g32"):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    stored = quantize_weight(weight, METHODS.get("rtn")(), WeightSpec.parse(name), is_transposed=is_transposed)
    return nn.Parameter(stored, requires_grad=False)


class Uses(nn.Module):
    """One weight, used as the test says."""

    def __init__(self, weight, use):
        super().__init__()
        self.weight, self.use = weight, use

    def forward(self, x):
        return self.use(x, self.weight)


LINEAR, BMM, PLAIN = "ptqc.linear.default", "ptqc.bmm.default", "ptqc.dequantize.default"
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
CASES = {
    "linear": (parameter((96, 64)), lambda x, w: nn.functional.linear(x, w), {LINEAR}),
    "linear with keyword bias": (
        parameter((96, 64)),
        lambda x, w: nn.functional.linear(x, w, bias=x[0, 0, 0].expand(96)),
        {LINEAR},
    ),
    "matmul with a transpose": (parameter((96, 64)), lambda x, w: x @ w.t(), {LINEAR}),
    "matmul with .T": (parameter((96, 64)), lambda x, w: x @ w.T, {LINEAR}),
    "matmul with .mT": (parameter((96, 64)), lambda x, w: torch.matmul(x, w.mT), {LINEAR}),
    "matmul of [in, out]": (parameter((64, 96), True), lambda x, w: torch.matmul(x, w), {LINEAR}),
    "addmm of Conv1D": (parameter((64, 96), True), lambda x, w: torch.addmm(x[0, 0, 0].expand(96), x[0], w), {LINEAR}),
    "bmm of experts": (parameter((3, 96, 64)), lambda x, w: torch.bmm(x, w.transpose(1, 2)), {BMM}),
    "bmm of experts with .mT": (parameter((3, 96, 64)), lambda x, w: torch.bmm(x, w.mT), {BMM}),
    "einsum": (parameter((96, 64)), lambda x, w: torch.einsum("bti,oi->bto", x, w), {PLAIN}),
    "one expert": (parameter((3, 96, 64)), lambda x, w: x @ w[1].t(), {PLAIN}),
    "arithmetic": (parameter((96, 64)), lambda x, w: nn.functional.linear(x, 1 + w), {PLAIN}),
    "two uses": (parameter((64, 64)), lambda x, w: nn.functional.linear(x, w) + w.sum(), {LINEAR, PLAIN}),
    "a product on the wrong side": (parameter((64, 96)), lambda x, w: x @ w, {PLAIN}),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case):
    weight, use, expected = CASES[case]
    calls, context, counts, output = lowered(Uses(weight, use), X)
    assert {call for call in calls if call.startswith("ptqc")} == expected
    assert counts["lower-linears"] == (len(context.quantized) if case != "two uses" else 2)
    dense = nn.Parameter(weight.dequantize(), requires_grad=False)
    torch.testing.assert_close(output, use(X, dense), rtol=1e-4, atol=1e-3)


def test_it_does_not_fire_without_stored_weights():
    calls, context, counts, _ = lowered(Uses(nn.Parameter(torch.ones(96, 64)), nn.functional.linear), X)
    assert not any(counts.values())
    assert not [call for call in calls if call.startswith("ptqc")]
    assert not context.chosen


def test_a_weight_shared_by_two_linears_is_registered_once():
    weight = parameter((64, 64))
    calls, context, _, output = lowered(
        Uses(weight, lambda x, w: nn.functional.linear(nn.functional.linear(x, w), w)), X
    )
    assert calls.count(LINEAR) == 2
    assert len(context.quantized) == 1
    assert all(isinstance(stored, QuantTensor) for stored in context.quantized.values())
    assert output.shape == X.shape


def test_dump_writes_every_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("PTQC_DUMP", str(tmp_path / "graphs"))
    lowered(Uses(parameter((96, 64)), nn.functional.linear), X)
    texts = {path.name.split("-", 1)[1]: path.read_text() for path in (tmp_path / "graphs").iterdir()}
    assert {"quantize-weights.txt", "lower-linears.txt", "emit-kernels.txt"} < set(texts)
    assert "int4g32 [96, 64]" in texts["lower-linears.txt"]
    assert "ptqc.linear" in texts["emit-kernels.txt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda x, w: nn.functional.linear(x, w, x[0, 0, 0].expand(96)), LINEAR),
        (lambda x, w: torch.einsum("bti,oi->bto", x, w), PLAIN),
    ],
)
def test_what_stands_around_a_weight_becomes_nodes(kind, use, expected):
    _, stored = surrounded(kind, (96, 64))
    weight = nn.Parameter(stored, requires_grad=False)
    calls, _, _, output = lowered(Uses(weight, use), X)
    rotations = {"input rotation": 1, "output rotation": 1, "everything": 2}.get(kind, 0)
    quantizations = int(stored.surroundings.act.dtype is not None and expected == LINEAR)
    assert calls.count(expected) == 1
    assert sum(call.startswith("ptqc.hadamard") for call in calls) == rotations
    assert calls.count("ptqc.fake_quantize.default") == quantizations
    torch.testing.assert_close(output, use(X, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_around_a_stack_becomes_nodes(kind):
    weight = nn.Parameter(surrounded(kind, (3, 96, 64))[1], requires_grad=False)
    calls, _, _, output = lowered(Uses(weight, lambda x, w: torch.bmm(x, w.transpose(1, 2))), X)
    assert calls.count(BMM) == 1
    torch.testing.assert_close(output, torch.bmm(X, weight.transpose(1, 2)), rtol=1e-5, atol=1e-4)
