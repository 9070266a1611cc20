import json

import pytest

from ptqc import texts
from ptqc.errors import PtqcError


class Words:
    """A tokenizer whose tokens are the lengths of words."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, **_):
        self.calls += 1
        return {"input_ids": [len(word) for word in text.split()]}


def test_docs_is_the_language_reference():
    text = texts.docs()
    assert len(text) > 300_000
    assert "with_stmt" in text
    assert text == texts.docs()


def test_code_is_python():
    text = texts.code()
    assert len(text) > 1_000_000
    assert "class ArgumentParser" in text
    assert text == texts.code()


def test_code_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(PtqcError, match="no sources of the standard library"):
        texts.code()


@pytest.mark.parametrize("name", ["docs", "code"])
def test_embedded_texts_are_one_document(name):
    assert texts.read_documents(name) == [texts.EMBEDDED[name]()]


def test_plain_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\n", encoding="utf-8")
    assert texts.read_documents(file) == ["one\n\ntwo\n"]


def test_jsonl_is_a_document_a_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"body": word}) for word in ("one", "two")) + "\n\n", encoding="utf-8")
    assert texts.read_documents(file, "body") == ["one", "two"]


def test_parquet_is_a_document_a_row(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert texts.read_documents(tmp_path / "a.parquet") == ["one", "two"]
    with pytest.raises(PtqcError, match="no column 'body'; it has text"):
        texts.read_documents(tmp_path / "a.parquet", "body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "no UTF-8 text: byte 0"),
        ("a.txt", b" \n ", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 is no JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl", b'{"body": "a"}', r"no text in 'text' \(found: body\)"),
        ("a.jsonl", b"[1]", r"found: list"),
        ("a.parquet", b"not a parquet file", "no parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PtqcError, match=message) as caught:
        texts.read_documents(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.txt", "a whole text " * 1000])
def test_what_is_no_file_is_said(source):
    with pytest.raises(PtqcError, match=r"neither a file nor one of the embedded texts \(docs, code\)") as caught:
        texts.read_documents(source)
    assert len(str(caught.value)) < 200


def test_dataset_column(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    assert texts.read_dataset("owner/name:small", "train") == ["one", "two"]
    assert asked == [(("owner/name", "small"), {"split": "train"})]
    with pytest.raises(PtqcError, match="no column 'body'; it has text"):
        texts.read_dataset("owner/name", "train", "body")


def test_dataset_that_cannot_be_read(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(PtqcError, match=r"cannot read split 'test' of the data set 'owner/name': no route$"):
        texts.read_dataset("owner/name")


def test_tokenize_keeps_every_word_across_pieces(monkeypatch):
    text = "a bb ccc\n" * 100
    whole = texts.tokenize(text, Words())
    monkeypatch.setattr(texts, "_PIECE", 50)
    tokenizer = Words()
    assert texts.tokenize(text, tokenizer).tolist() == whole.tolist() == [1, 2, 3] * 100
    assert tokenizer.calls > 10


def test_tokenize_stops_at_the_limit(monkeypatch):
    monkeypatch.setattr(texts, "_PIECE", 50)
    tokenizer = Words()
    assert texts.tokenize("a bb ccc\n" * 100, tokenizer, limit=4).tolist() == [1, 2, 3, 1]
    assert tokenizer.calls == 1


TALK = [{"role": "user", "content": "a"}]


def test_conversations_in_files(tmp_path, caplog):
    caplog.set_level("INFO", "ptqc")
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"text": "b"}), encoding="utf-8")
    assert texts.read_any_documents(file) == [TALK, "b"]
    with pytest.raises(PtqcError, match="holds conversations, and a text is needed"):
        texts.read_documents(file)


def test_conversations_in_tables(tmp_path, caplog):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    caplog.set_level("INFO", "ptqc")
    parquet.write_table(arrow.table({"messages": [TALK, None]}), tmp_path / "a.parquet")
    assert texts.read_any_documents(tmp_path / "a.parquet") == [TALK]
    assert "1 of 2 documents are null" in caplog.text


def test_conversations_in_data_sets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"messages": [TALK]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    assert texts.read_any_dataset("owner/name") == [TALK]
    with pytest.raises(PtqcError, match="'owner/name' holds conversations"):
        texts.read_dataset("owner/name")
