import json
import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ptqc import calibrate
from ptqc.calibrate import batches, fingerprint, shard
from ptqc.errors import PtqcError

END = 99


class Words:
    """A tokenizer whose tokens are the lengths of words."""

    eos_token_id = END

    def __call__(self, text, **_):
        return {"input_ids": [len(word) for word in text.split()]}


def ids_of(found):
    return [batch["input_ids"].tolist() for batch in found]


def test_documents_are_packed_with_end_tokens_between():
    found = batches(["a bb", "ccc", "a a a"], Words(), window=3)
    assert ids_of(found) == [[[1, 2, END]], [[3, END, 1]]]
    assert all(batch["input_ids"].dtype == torch.int64 for batch in found)


def test_what_is_cut_off_is_logged(caplog):
    caplog.set_level(logging.INFO, "ptqc")
    batches(["a bb", "ccc", "a a a"], Words(), window=3)
    assert "2 windows of 3 tokens, 2 tokens cut off" in caplog.text


def test_limit_bounds_windows_and_reading(caplog):
    caplog.set_level(logging.INFO, "ptqc")
    found = batches(["a bb ccc"] * 100, Words(), window=3, limit=2)
    assert len(found) == 2
    assert "documents not read" in caplog.text


def test_files_are_packed(tmp_path):
    (tmp_path / "a.txt").write_text("a bb ccc " * 4, encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "a bb ccc"}) for _ in range(3)), encoding="utf-8")
    assert ids_of(batches(tmp_path / "a.txt", Words(), window=6)) == [[[1, 2, 3] * 2]] * 2
    assert ids_of(batches(str(tmp_path / "a.jsonl"), Words(), window=4, limit=1)) == [[[1, 2, 3, END]]]


def test_embedded_text_fills_the_limit():
    found = batches("docs", Words(), window=64, limit=3)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(1, 64)] * 3


def test_one_long_tensor_is_packed():
    assert ids_of(batches(torch.arange(7), window=3)) == [[[0, 1, 2]], [[3, 4, 5]]]


def test_rows_are_a_batch_as_they_are():
    rows = torch.arange(6, dtype=torch.int32).view(2, 3)
    assert ids_of(batches(rows, window=512)) == [rows.tolist()]


@pytest.mark.parametrize(
    "items",
    [
        [torch.tensor([1, 2, 3]), torch.tensor([[4, 5]])],
        [[1, 2, 3], [4, 5]],
        ({"input_ids": ids} for ids in ([[1, 2, 3]], [[4, 5]])),
        iter([(torch.tensor([1, 2, 3]),), (torch.tensor([4, 5]),)]),
    ],
)
def test_iterables_give_a_batch_an_item(items):
    assert ids_of(batches(items)) == [[[1, 2, 3]], [[4, 5]]]


def test_data_loader():
    loader = DataLoader(TensorDataset(torch.arange(12).view(4, 3)), batch_size=2)
    assert ids_of(batches(loader)) == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_mappings_keep_their_names_and_drop_none():
    image = torch.zeros(1, 3, 4, 4)
    found = batches({"pixel_values": image, "mask": None, "ids": [[1, 2]]})
    assert len(found) == 1
    assert found[0].keys() == {"pixel_values", "ids"}
    assert found[0]["pixel_values"] is image
    assert found[0]["ids"].tolist() == [[1, 2]]


def test_an_endless_iterable_stops_at_the_limit_and_says_so(caplog):
    def endless():
        while True:
            yield torch.tensor([[1, 2]])

    assert len(batches(endless(), limit=5)) == 5
    assert "stopped after 5 batches" in caplog.text


class Chats(Words):
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize):
        return " ".join(message["content"] for message in messages)


TALK = [{"role": "user", "content": "a bb"}, {"role": "assistant", "content": "ccc"}]


@pytest.mark.parametrize("talks", [TALK, [TALK], [{"messages": TALK}], [{"id": 3, "conversations": TALK}]])
def test_conversations_are_documents(talks):
    assert ids_of(batches(talks, Chats(), window=3)) == [[[1, 2, 3]]]


def test_conversations_in_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": TALK})] * 2), encoding="utf-8")
    assert ids_of(batches(tmp_path / "a.jsonl", Chats(), window=7)) == [[[1, 2, 3, END, 1, 2, 3]]]
    with pytest.raises(PtqcError, match="no chat template"):
        batches(tmp_path / "a.jsonl", Words(), window=7)


def test_rows_of_a_data_set_are_documents():
    rows = [{"text": "a bb", "label": 1}, {"text": "ccc", "label": 0}]
    assert ids_of(batches(rows, Words(), window=4)) == [[[1, 2, END, 3]]]
    assert ids_of(batches([{"body": "a bb ccc"}], Words(), window=3, column="body")) == [[[1, 2, 3]]]


def test_data_sets_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(calibrate, "read_any_dataset", lambda *a: asked.append(a) or ["a bb ccc"])
    assert ids_of(batches("owner/name:small", Words(), window=3, split="test")) == [[[1, 2, 3]]]
    assert ids_of(batches("wikitext", Words(), window=3, column="body")) == [[[1, 2, 3]]]
    assert asked == [("owner/name:small", "test", "text"), ("wikitext", "train", "body")]


def test_batches_of_a_list_are_drawn_by_seed(caplog):
    caplog.set_level(logging.INFO, "ptqc")
    items = [torch.tensor([[n]]) for n in range(50)]
    first, again, other = (ids_of(batches(items, limit=5, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert "5 of 50 batches drawn with seed 0" in caplog.text
    assert len(batches(items, limit=None)) == 50


def test_shards_are_numbered(monkeypatch):
    items = [{"input_ids": torch.tensor([[n]])} for n in range(5)]
    assert [number for number, _ in shard(items)] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert [(number, int(batch["input_ids"])) for number, batch in shard(items)] == [(1, 1), (3, 3)]


def test_fingerprints_tell_data_apart():
    ids, mask = torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    base = fingerprint([{"input_ids": ids, "mask": mask}])
    assert base == fingerprint([{"mask": mask.clone(), "input_ids": ids.clone()}])
    others = [
        [{"input_ids": ids}],
        [{"input_ids": ids.int(), "mask": mask}],
        [{"input_ids": ids.T, "mask": mask}],
        [{"input_ids": ids + 1, "mask": mask}],
        [{"input_ids": mask, "mask": ids}],
        [{"input_ids": ids}, {"mask": mask}],
        [{"input_ids": ids, "mask": mask}] * 2,
        [{"input_ids": torch.tensor(1.5), "mask": torch.zeros(2, dtype=torch.bfloat16)}],
    ]
    assert len({base, *map(fingerprint, others)}) == 9


@pytest.mark.parametrize(
    ("calibration", "tokenizer", "message"),
    [
        ([], None, "is empty"),
        (["", " "], Words(), "has 0 tokens, one window takes 512"),
        (["a bb"], Words(), "has 2 tokens, one window takes 512"),
        (["a bb"], None, "needs the model's tokenizer"),
        (torch.arange(5), None, "has 5 tokens, one window takes 512"),
        (torch.zeros(0, dtype=torch.int64), None, "is empty"),
        (torch.zeros(2, 3), None, "holds no token ids; name the input"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), None, r"\[tokens\] or \[rows, tokens\], not \(2, 3, 4\)"),
        ({"input_ids": torch.zeros(0, 3)}, None, "is empty"),
        ({}, None, "inputs: none"),
        ({"input_ids": [[1], [2, 3]]}, None, "'input_ids' is a list, not a tensor"),
        ([object()], None, "batch cannot be a object"),
        (["a", torch.zeros(1)], Words(), "batch cannot be a str"),
        (3, None, "cannot be a int"),
        ("missing.jsonl", Words(), "neither a file nor"),
    ],
)
def test_useless_data_is_an_error(calibration, tokenizer, message):
    with pytest.raises(PtqcError, match=message):
        batches(calibration, tokenizer)


def test_limit_must_be_positive():
    with pytest.raises(PtqcError, match="at least one calibration batch"):
        batches(torch.zeros(1, 3, dtype=torch.int64), limit=0)
