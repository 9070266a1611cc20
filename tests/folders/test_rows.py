"""Float folders as models without values, and their weights some rows at a time."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptqc
from ptqc.errors import CheckpointError
from ptqc.folders.folder import open_folder
from ptqc.folders.rows import open_unread
from tests.export._models import EXPERTS, small_model

SMALL = {"vocab_size": 700, "num_hidden_layers": 2}


def written(folder, family="Llama", dtype=torch.bfloat16, **changes):
    """A folder and the model that is loaded from it."""
    model = small_model(family, **(SMALL | changes)).to(dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    return open_folder(folder), ptqc.load(folder)


@pytest.mark.parametrize(
    ("family", "changes"), [("Llama", {"tie_word_embeddings": True}), ("GPT2", {}), ("Mixtral", EXPERTS)]
)
def test_rows_are_those_of_the_model_that_is_loaded(tmp_path, family, changes):
    stored, model = written(tmp_path / "m", family, **changes)
    unread = open_unread(stored)
    assert {weight.is_meta for weight in unread.model.parameters()} == {True}
    assert [name for name, _ in unread.model.named_parameters()] == [name for name, _ in model.named_parameters()]
    for name, weight in model.named_parameters():
        matrix = weight.detach().reshape(-1, weight.shape[-1])
        assert unread.model.get_parameter(name).dtype == weight.dtype
        for start, stop in ((0, len(matrix)), (len(matrix) // 3, len(matrix) - len(matrix) // 4)):
            assert torch.equal(unread.read(name, start, stop), matrix[start:stop]), name


def test_rows_across_the_pieces_of_a_parameter(tmp_path):
    stored, model = written(tmp_path / "m", "Mixtral", **EXPERTS)
    unread, name = open_unread(stored), "model.layers.1.mlp.experts.gate_up_proj"
    assert len(unread.pieces[name]) == 8  # a gate and an up for each expert
    matrix = model.get_parameter(name).detach().reshape(-1, 64)
    for start, stop in ((0, 1), (95, 97), (96, 192), (90, 400), (767, 768)):
        assert torch.equal(unread.read(name, start, stop), matrix[start:stop])


def test_what_is_stored_in_another_way_is_said(tmp_path):
    model = written(tmp_path / "m")[1]
    ptqc.save(ptqc.quantize(model, "rtn", bits=4, progress=False), tmp_path / "q")
    assert open_unread(open_folder(tmp_path / "q")) == "it is quantized"
    model = written(tmp_path / "tied", tie_word_embeddings=True)[1]
    tensors = {name: weight.clone() for name, weight in model.state_dict().items()}
    tensors["lm_head.weight"] += 1
    for file in (tmp_path / "tied").glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    assert "stored twice with different values" in open_unread(open_folder(tmp_path / "tied"))


def test_a_folder_that_lacks_a_weight_is_an_error(tmp_path):
    small_model(**SMALL).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        open_unread(open_folder(tmp_path / "m"))
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert not isinstance(open_unread(open_folder(tmp_path / "m")), str)
