import json
import os

import pytest
import torch
from safetensors.torch import save_file

from ptqc.errors import CheckpointError
from ptqc.folders.folder import copy_companions, local_folder, open_folder, read_json


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.full((4,), 2.0)}, path / "model-00002-of-00002.safetensors")
    index(path, {"a": 1, "b": 1, "c": 2})
    return path


def index(path, numbers):
    weight_map = {
        name: f"model-0000{number}-of-00002.safetensors" if isinstance(number, int) else number
        for name, number in numbers.items()
    }
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_sharded_folder_is_read_without_its_tensors(folder):
    stored = open_folder(folder)
    assert stored.config == {"model_type": "llama"}
    assert {name: entry.read().tolist() for name, entry in stored.entries.items()} == {
        "a": [0, 0],
        "b": [1, 1, 1],
        "c": [2, 2, 2, 2],
    }
    assert stored.layout["b"] == ((3,), torch.float32)


def test_a_single_file_wins_over_an_index(folder):
    save_file({"whole": torch.zeros(1)}, folder / "model.safetensors")
    assert set(open_folder(folder).entries) == {"whole"}


def test_links_into_a_cache_are_followed(folder, tmp_path):
    os.rename(folder / "model-00002-of-00002.safetensors", tmp_path / "blob")
    os.symlink(tmp_path / "blob", folder / "model-00002-of-00002.safetensors")
    assert "c" in open_folder(folder).entries


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", "", 3.5, None, "a\0.safetensors",
     "c:\\x.safetensors", "..\\x.safetensors"],
)  # fmt: skip
def test_an_index_reaches_nothing_outside_the_folder(folder, file):
    save_file({"a": torch.zeros(1)}, folder.parent / "secret.safetensors")
    index(folder, {"a": file})
    with pytest.raises(CheckpointError, match=r"index\.json names the file .*; only safetensors files beside it"):
        open_folder(folder)


def test_faults_of_an_index_are_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names model-00002-of-00002\.safetensors, which is missing"):
        open_folder(folder)
    index(folder, {"a": 1, "ghost": 1})
    with pytest.raises(CheckpointError, match="seeks ghost in model-00001"):
        open_folder(folder)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="has no weight_map"):
            open_folder(folder)
    for file in ({}, [], None, 3):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(CheckpointError, match="only safetensors files beside it"):
            open_folder(folder)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "is missing"), (b"", "no valid JSON"), (b"\xff", "no valid JSON"), (b"[]", "no JSON object"),
     (b"[" * 10**5, "no valid JSON"), (b'{"a": }', "no valid JSON")],
)  # fmt: skip
def test_a_missing_or_broken_config_is_named(folder, content, complaint):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{complaint}") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_pickle_instead_of_safetensors_is_refused_unopened(folder):
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, .*save_pretrained"):
        open_folder(folder)


def test_what_is_no_folder_is_an_error(folder, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        local_folder(folder / "config.json")
    with pytest.raises(CheckpointError, match="does not exist; give a model folder, or a hub repository"):
        local_folder(tmp_path / "no" / "such" / "place")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing is no folder here, and the hub does not give it"):
        local_folder("nobody/nothing")


def test_an_unreadable_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read"):
        read_json(tmp_path)


def test_companions_are_copied_and_weights_are_not(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json", "merges.txt",
                 "chat_template.jinja", "code.py", "README.md", "tokenizer.safetensors"):  # fmt: skip
        (folder / name).write_text(name)
    (tmp_path / "out").mkdir()
    copy_companions(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    copy_companions(folder, tmp_path / "out", with_code=True)
    assert (tmp_path / "out" / "code.py").exists()
