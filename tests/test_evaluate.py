import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from ptqc import evaluate as evaluation
from ptqc.errors import PtqcError
from ptqc.evaluate import evaluate, record, windows_of

VOCABULARY = 50


class Bigram(nn.Module):
    """A language model: logits of the next token from this one."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids):
        return SimpleNamespace(logits=self.dropout(self.table[ids]))


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (203,), generator=torch.Generator().manual_seed(1))


def expected_logits(model, tokens, window):
    """Logits and targets of all scored positions, by the definition."""
    cut = tokens[: len(tokens) // window * window].view(-1, window)
    return model.table.detach()[cut[:, :-1]].flatten(0, 1), cut[:, 1:].flatten()


def test_perplexity_is_that_of_the_definition(tokens):
    model = Bigram()
    logits, targets = expected_logits(model, tokens, 20)
    found = evaluate(model, tokens, window=20, batch=3)
    assert found.perplexity == pytest.approx(math.exp(cross_entropy(logits, targets)), rel=1e-5)
    assert found.tokens == 190
    assert (found.kl, found.top1) == (None, None)


def test_kl_and_top1_are_those_of_the_definition(tokens):
    model, other = Bigram(0), Bigram(1)
    found_logits, _ = expected_logits(model, tokens, 20)
    float_logits, _ = expected_logits(other, tokens, 20)
    found_logs, float_logs = found_logits.log_softmax(-1), float_logits.log_softmax(-1)
    divergence = kl_div(found_logs, float_logs, log_target=True, reduction="batchmean")
    found = evaluate(model, tokens, window=20, against=other)
    assert found.kl == pytest.approx(float(divergence), rel=1e-5)
    assert found.top1 == pytest.approx(float((found_logits.argmax(-1) == float_logits.argmax(-1)).float().mean()))


def test_a_model_agrees_with_itself(tokens):
    model = Bigram()
    found = evaluate(model, tokens, window=20, against=copy.deepcopy(model))
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.top1 == 1


def test_batch_and_chunk_change_nothing(tokens, monkeypatch):
    model, other = Bigram(0), Bigram(1)
    whole = evaluate(model, tokens, window=20, against=other, batch=100)
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 7 * VOCABULARY)
    pieces = evaluate(model, tokens, window=20, against=other, batch=1)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-5)
    assert pieces.tokens == whole.tokens


def test_recorded_log_probabilities_stand_for_the_model(tokens, tmp_path):
    model, other = Bigram(0), Bigram(1)
    kept = record(other, tokens, tmp_path / "logits", window=20, windows=6, batch=4)
    assert kept.path.stat().st_size == 6 * 19 * VOCABULARY * 4
    direct = evaluate(model, tokens, window=20, windows=6, against=other)
    recorded = evaluate(model, tokens, window=20, windows=6, against=kept, batch=5)
    assert recorded.kl == pytest.approx(direct.kl, rel=1e-6)
    assert recorded.top1 == direct.top1
    assert kept.evaluation.perplexity == evaluate(other, tokens, window=20, windows=6).perplexity


def test_recorded_log_probabilities_of_another_text_are_refused(tokens, tmp_path):
    kept = record(Bigram(), tokens, tmp_path / "logits", window=20)
    with pytest.raises(PtqcError, match="belong to other windows"):
        evaluate(Bigram(), tokens.flip(0), window=20, against=kept)


def test_a_full_disk_is_foreseen(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.shutil, "disk_usage", lambda path: SimpleNamespace(free=19 * VOCABULARY * 4 * 3))
    with pytest.raises(PtqcError, match="evaluate at most 3 windows"):
        record(Bigram(), tokens, tmp_path / "logits", window=20)


def test_excluded_tokens_do_not_make_the_divergence_nan(tokens):
    model, other = Bigram(0), Bigram(1)
    ids = tokens % 40
    for each in (model, other):
        each.table.data[:, 45:] = -math.inf
    found = evaluate(model, ids, window=20, against=other)
    assert math.isfinite(found.kl)
    assert found.kl > 0


def test_mode_and_gradients_are_left_as_they_were(tokens):
    model = Bigram().train()
    evaluate(model, tokens, window=20)
    assert model.training
    assert torch.is_grad_enabled()


def test_half_precision_logits_are_scored_in_float32(tokens):
    model = Bigram()
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert evaluate(half, tokens, window=20, against=model).kl < 1e-4


def test_progress_counts_windows(tokens):
    seen = []
    evaluate(Bigram(), tokens, window=20, batch=4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_windows_do_not_overlap(tokens):
    cut = windows_of(tokens, 20)
    assert cut.shape == (10, 20)
    assert torch.equal(cut.flatten(), tokens[:200])
    assert len(windows_of(tokens, 20, 3)) == 3
    assert len(windows_of(tokens, 20, 99)) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 512}, "the text has 203 tokens, a window takes 512"),
        ({"window": 1}, "at least 2 tokens"),
        ({"windows": 0, "window": 20}, "at least one window"),
    ],
)
def test_impossible_windows_are_errors(tokens, arguments, message):
    with pytest.raises(PtqcError, match=message):
        evaluate(Bigram(), tokens, **arguments)


def test_models_without_logits_are_refused(tokens):
    classifier = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(PtqcError, match=r"gives no logits .* \(found: \(4, 3\)\); only causal language models"):
        evaluate(classifier, tokens, window=20)


def test_models_of_two_vocabularies_do_not_compare(tokens):
    other = Bigram()
    other.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY + 1))
    with pytest.raises(PtqcError, match="vocabularies of 50 and 51"):
        evaluate(Bigram(), tokens, window=20, against=other)
