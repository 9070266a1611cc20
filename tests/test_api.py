"""`ptqc.quantize`: what it touches, what it leaves and says, what it refuses."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import ptqc.api as api
from ptqc.errors import PtqcError, SpecError, WeightError
from ptqc.methods import METHODS
from ptqc.qtensor import QuantTensor


class Small(nn.Module):
    """Linear, Conv1D, tied embedding and head, a convolution, a norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.first, self.second = nn.Linear(64, 96), Conv1D(64, 96)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.head(self.norm(self.second(torch.relu(self.first(x)))))


IDS = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().eval()


def names(model):
    return {name for name, weight in model.named_parameters() if isinstance(weight, QuantTensor)}


def test_it_touches_linears_and_returns_the_model(small):
    expected = small(IDS)
    assert api.quantize(small, "rtn", bits=8, progress=False) is small
    assert names(small) == {"first.weight", "second.weight"}
    assert small.second.weight.is_transposed
    assert (small(IDS) - expected).norm() / expected.norm() < 0.02


def test_reasons_are_reported(small, caplog):
    with caplog.at_level(logging.INFO, "ptqc"):
        api.quantize(small, "rtn", progress=False)
    assert "quantized 2 weights (2 x int4g64)" in caplog.text or "quantized 2 weights (" in caplog.text
    assert "1 left in float: tied to an embedding" in caplog.text
    assert "1 left in float: a convolution" in caplog.text


def test_include_and_exclude(small):
    model = api.quantize(copy.deepcopy(small), "rtn", exclude=["second"], progress=False)
    assert names(model) == {"first.weight"}
    model = api.quantize(copy.deepcopy(small), "rtn", include=["first", "embed"], progress=False)
    assert names(model) == {"first.weight", "embed.weight"}
    assert model.head.weight is model.embed.weight
    assert model(IDS).isfinite().all()


def test_groups_give_way_but_exact_specs_do_not(small):
    api.quantize(small, "rtn", bits=4, group_size=48, include=["first"], progress=False)
    assert str(small.first.weight.spec) == "int4g32"
    with pytest.raises(SpecError, match=r'"second.weight".*group 128 does not divide in_features 96; use'):
        api.quantize(small, "rtn", spec="int4g128", include=["second"], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_name_the_tensor_and_leave_the_model_alone(small, value):
    with torch.no_grad():
        small.second.weight[3, 5] = value
    with pytest.raises(WeightError, match=r'"second.weight" holds 1 NaN or infinite'):
        api.quantize(small, "rtn", progress=False)
    assert not names(small)


def test_touching_nothing_is_an_error(small):
    with pytest.raises(PtqcError, match="nothing would be quantized"):
        api.quantize(small, "rtn", include=["nowhere"], progress=False)
    api.quantize(small, "rtn", progress=False)
    with pytest.raises(PtqcError, match="already"):
        api.quantize(small, "rtn", progress=False)


def test_a_recipe_says_everything(small):
    recipe = [{"pattern": "first", "method": "rtn", "bits": 8}, {"pattern": "*", "method": "rtn", "spec": "nf4g32"}]
    api.quantize(small, recipe=recipe, progress=False)
    assert (str(small.first.weight.spec), str(small.second.weight.spec)) == ("int8", "nf4g32")
    with pytest.raises(PtqcError, match="either"):
        api.quantize(small, progress=False)
    with pytest.raises(PtqcError, match="drop bits"):
        api.quantize(small, recipe=recipe, bits=4, progress=False)


def test_a_method_that_needs_statistics_says_so(small):
    class Needy(METHODS.get("rtn")):
        needs = frozenset({"hessian"})

    with pytest.raises(PtqcError, match="hessian"):
        api.quantize(small, Needy(), progress=False)


class Experts(nn.Module):
    """Packed experts [E, in, out] and [E, out, in], and a bare router."""

    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(4, 64))
        self.up, self.down = nn.Parameter(torch.randn(4, 64, 96)), nn.Parameter(torch.randn(4, 64, 96))
        self.position = nn.Parameter(torch.randn(16, 64))

    def forward(self, x):
        x = x + self.position[: x.shape[0]]
        best = torch.softmax(x @ self.router.t(), -1).topk(2).indices
        hidden = torch.relu(torch.bmm(x.expand(4, -1, -1), self.up))
        out = torch.bmm(hidden, self.down.transpose(1, 2))
        return out.gather(0, best.T[:, :, None].expand(-1, -1, 64)).sum(0)


def test_bare_matrices_are_decided_by_their_use():
    torch.manual_seed(0)
    model = Experts().eval()
    batch = {"x": torch.randn(5, 64)}
    expected = model(**batch)
    with pytest.raises(PtqcError, match="example batch"):
        api.quantize(model, "rtn", progress=False)
    api.quantize(model, "rtn", bits=8, calibration=[batch], progress=False)
    assert names(model) == {"up", "down"}
    assert (model.up.is_transposed, model.down.is_transposed) == (True, False)
    assert (model(**batch) - expected).norm() / expected.norm() < 0.02


@pytest.mark.slow
def test_auto_is_a_method_of_quantize():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    data = [{"input": torch.randn(32, 64)} for _ in range(2)]
    api.quantize(model, "auto", bits=5, base="rtn", group_size=32, calibration=data, progress=False)
    stored = [weight for weight in model.parameters() if isinstance(weight, QuantTensor)]
    assert 8 * sum(weight.nbytes for weight in stored) <= 5 * sum(weight.numel() for weight in stored)
    with pytest.raises(PtqcError, match="auto measures what weights are worth on calibration data"):
        api.quantize(nn.Linear(64, 64), "auto", bits=5)
    with pytest.raises(PtqcError, match="auto has no option bsae; known: bits, base"):
        api.quantize(nn.Linear(64, 64), "auto", bsae="rtn", calibration=data)


def test_patterns_may_be_a_text_and_misspelt_ones_are_told(small, caplog):
    model = api.quantize(copy.deepcopy(small), "rtn", exclude="second", progress=False)
    assert names(model) == {"first.weight"} and not caplog.text
    model = api.quantize(copy.deepcopy(small), "rtn", include="firs*", exclude=["secnod"], progress=False)
    assert names(model) == {"first.weight"}
    assert "exclude: the pattern 'secnod' names no parameter of the model" in caplog.text


class Shared(nn.Module):
    """One module in two places, and another that has its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second, self.third = self.first, nn.Linear(64, 64)
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(torch.relu(self.second(self.first(x))))


@pytest.mark.parametrize("name", ["first", "second", "third.weight"])
def test_a_tied_weight_goes_by_each_of_its_names(small, name):
    with pytest.raises(PtqcError, match="excluded"):
        api.quantize(Shared(), "rtn", exclude=[name], progress=False)
    recipe = [{"pattern": name, "method": "int8"}, {"pattern": "*", "method": "rtn"}]
    model = api.quantize(Shared(), recipe=recipe, progress=False)
    assert str(model.first.weight.spec) == "int8" and model.third.weight is model.first.weight
    tied = api.quantize(small, "rtn", bits=8, include=["head"], progress=False)
    assert names(tied) == {"embed.weight"} and tied.head.weight is tied.embed.weight


def test_naming_a_weight_does_not_say_how_it_lies():
    torch.manual_seed(0)
    model, batch = Experts().eval(), {"x": torch.randn(5, 64)}
    with pytest.raises(PtqcError, match="example batch"):
        api.quantize(model, "rtn", include=["up"], progress=False)
    api.quantize(model, "rtn", include=["up"], calibration=[batch], progress=False)
    assert names(model) == {"up"} and model.up.is_transposed


def test_a_head_that_lies_the_other_way_is_stored_so():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(64, 64), Conv1D(32, 64)

        def get_output_embeddings(self):
            return self.head

    model = api.quantize(Turned(), "rtn", include=["head"], progress=False)
    assert model.head.weight.is_transposed


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_modules_compute_with_what_they_hold(kind):
    torch.manual_seed(0)
    model, x = kind(64, 64, num_layers=2).eval(), torch.randn(5, 2, 64)
    expected = model(x)[0]
    with pytest.raises(PtqcError, match=r"weight_ih_l0: of a recurrent module .name it in include"):
        api.quantize(model, "rtn", progress=False)
    api.quantize(model, "rtn", bits=2, include=["weight_*"], progress=False)
    assert len(names(model)) == 4
    error = (model(x)[0] - expected).norm() / expected.norm()
    assert 0.05 < error < 0.9
