import copy

import pytest
import torch
from torch import nn

import ptqc.api
from ptqc.comparison.compare import Candidate, compare, layer_errors, parse_candidates
from ptqc.errors import PtqcError
from ptqc.qtensor import QuantTensor


class Bigram(nn.Module):
    """A language model with two linears: logits of the next token from this one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, ids):
        return self.down(self.up(self.embed(ids)).relu()) * 20


@pytest.fixture
def tokens():
    return torch.randint(64, (200,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtn", Candidate("rtn", "rtn")),
        (" rtn:4 ", Candidate("rtn:4", "rtn", 4)),
        ("rtn:3:128", Candidate("rtn:3:128", "rtn", 3, 128)),
        ("rtn:4:-1", Candidate("rtn:4:-1", "rtn", 4, -1)),
        ("rtn:1.58", Candidate("rtn:1.58", "rtn", 1.58)),
        ("rtn:int4g32z", Candidate("rtn:int4g32z", "rtn", spec="int4g32z")),
    ],
)
def test_candidates_parse(text, expected):
    assert Candidate.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus", "no method is called 'bogus'"),
        ("rtn:9", "no integer spec has 9"),
        ("rtn:q5_9", "no weight spec"),
        ("rtn:4:x", "is no candidate"),
        ("rtn:4:32:1", "is no candidate"),
        ("rtn:4:1.5", "is no candidate"),
    ],
)
def test_impossible_candidates_are_errors(text, message):
    with pytest.raises(PtqcError, match=message):
        Candidate.parse(text)


def test_candidates_are_separated_by_commas_and_taken_once():
    assert [candidate.label for candidate in parse_candidates("rtn:4, rtn:3:32,rtn:4,")] == ["rtn:4", "rtn:3:32"]
    with pytest.raises(PtqcError, match="at least one method"):
        parse_candidates(" , ")


def test_a_comparison_has_a_row_for_each_candidate(tokens):
    model = Bigram().half()
    before = copy.deepcopy(model.state_dict())
    candidates = parse_candidates("rtn:8:32,rtn:4:32,rtn:2:32")
    found = compare(model, candidates, tokens, window=20, windows=5, names=("m", "t"))
    assert (found.model, found.text, found.window, found.windows) == ("m", "t", 20, 5)
    assert (found.baseline.spec, found.baseline.bits_per_weight, found.baseline.evaluation.kl) == ("float16", 16, None)
    assert [run.spec for run in found.runs] == ["int8g32", "int4g32", "int2g32"]
    assert [run.bits_per_weight for run in found.runs] == [8.5, 4.5, 2.5]
    divergences = [run.evaluation.kl for run in found.runs]
    assert 0 < divergences[0] < divergences[1] < divergences[2]
    assert all(run.evaluation.tokens == 95 for run in (found.baseline, *found.runs))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_sizes_are_those_of_the_model_as_stored(tokens):
    model = Bigram().half()
    run = compare(model, parse_candidates("rtn:4:32"), tokens, window=20).runs[0]
    weights = 2 * 64 * 128
    assert run.nbytes == 64 * 64 * 2 + weights * 4.5 / 8


def test_layer_errors_are_relative_norms(tokens):
    model = Bigram()
    quantized = ptqc.api.quantize(copy.deepcopy(model), "rtn", bits=3, group_size=32, progress=False)
    errors = {entry.name: entry.error for entry in layer_errors(quantized, model)}
    assert errors.keys() == {"up.weight", "down.weight"}
    assert isinstance(quantized.up.weight, QuantTensor)
    exact = model.up.weight.detach()
    difference = quantized.up.weight.dequantize() - exact
    assert errors["up.weight"] == pytest.approx(float(difference.norm() / exact.norm()))
    assert 0.05 < errors["up.weight"] < 0.3


def test_patterns_reach_the_method(tokens):
    run = compare(Bigram(), parse_candidates("rtn:4:32"), tokens, window=20, exclude=["down"]).runs[0]
    assert [entry.name for entry in run.layers] == ["up.weight"]


def test_steps_are_reported(tokens):
    steps = []
    compare(
        Bigram(), parse_candidates("rtn:4:32"), tokens, window=20, batch=5,
        on_step=lambda label, step, done, total: steps.append((label, step, done, total)),
    )  # fmt: skip
    assert steps == [
        ("float", "evaluate", 0, 1), ("float", "evaluate", 5, 10), ("float", "evaluate", 10, 10),
        ("rtn:4:32", "quantize", 0, 1), ("rtn:4:32", "evaluate", 5, 10), ("rtn:4:32", "evaluate", 10, 10),
    ]  # fmt: skip


def test_every_copy_is_shown_before_it_is_scored(tokens):
    seen = []

    def keep(candidate, model):
        seen.append((candidate.label, str(model.up.weight.spec), model.up.weight.dtype))

    compare(Bigram().half(), parse_candidates("rtn:4:32,rtn:8"), tokens, window=20, on_quantized=keep)
    assert seen == [("rtn:4:32", "int4g32", torch.float16), ("rtn:8", "int8", torch.float16)]


def test_nothing_is_left_in_the_temporary_folder(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PtqcError, match="nothing would be quantized"):
        compare(Bigram(), parse_candidates("rtn:4:32"), tokens, window=20, exclude=["*"])
    assert list(tmp_path.iterdir()) == []
