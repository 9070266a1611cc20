"""Windows: packing, and the seeded draw of stretches and windows."""

import logging

import pytest
import torch

from ptqc import texts
from ptqc.errors import PtqcError
from ptqc.windows import draw, pack, pack_texts


class Numbers:
    """A tokenizer of numbers, which are their own tokens."""

    eos_token_id = -1

    def __init__(self):
        self.calls = 0

    def __call__(self, text, **_):
        self.calls += 1
        return {"input_ids": [int(word) for word in text.split()]}


DOCUMENTS = [" ".join(str(100 * n + k) for k in range(10)) for n in range(40)]


def test_everything_is_packed_in_order_where_it_is_needed():
    found = torch.cat(pack_texts(DOCUMENTS, Numbers(), 4, None, seed=0)).tolist()
    assert found[:12] == [*range(10), -1, 100]
    assert len(found) == (40 * 11 - 1) // 4 * 4


def test_windows_are_drawn_by_seed(caplog):
    caplog.set_level(logging.INFO, "ptqc")
    first, again, other = (torch.stack(pack_texts(DOCUMENTS, Numbers(), 4, 10, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (10, 4)
    assert first[:, 0].max() > 1000  # from all over the text, not its beginning
    assert len({tuple(window.tolist()) for window in first}) == 10
    assert "documents not read" in caplog.text
    assert "10 of" in caplog.text and "windows drawn with seed 0" in caplog.text


def test_work_is_bounded_by_what_is_needed():
    tokenizer = Numbers()
    pack_texts(DOCUMENTS, tokenizer, 4, 2, 0)
    assert tokenizer.calls == 4  # 4 x 2 windows of 4 tokens, in documents of 10


def test_stretches_of_a_long_text_are_drawn_too(monkeypatch):
    monkeypatch.setattr(texts, "_PIECE", 50)
    text = "\n".join(DOCUMENTS)
    found = torch.stack(pack_texts([text], Numbers(), 4, 8, 0))
    assert found.max() > 1000
    whole = torch.cat(pack_texts([text], Numbers(), 4, None, 0))
    assert whole.tolist() == [100 * n + k for n in range(40) for k in range(10)]


def test_too_little_is_said(caplog):
    assert len(pack(torch.arange(9), 4, 5, 0)) == 2
    assert "5 windows were asked for, the data fills 2" in caplog.text
    with pytest.raises(PtqcError, match="has 3 tokens, one window takes 4"):
        pack(torch.arange(3), 4, 5, 0)
    with pytest.raises(PtqcError, match="at least one token, not 0"):
        pack(torch.arange(3), 0, 5, 0)


def test_draw_keeps_order_and_takes_no_item_twice():
    assert draw([1, 2, 3], None, 0, "items") == draw([1, 2, 3], 3, 0, "items") == [1, 2, 3]
    found = draw(list(range(100)), 10, 0, "items")
    assert found == sorted(set(found)) and len(found) == 10
