"""Names in folders: transformers' conversions, followed by labels."""

import pytest
import torch
from torch import nn

from ptqc.folders.naming import Piece, stacked, stored_names
from ptqc.methods import METHODS, quantize_weight
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings
from tests.tiny import MODELS, tiny


def rounded(weight, spec="int4g32", order=None):
    around = Surroundings(order=order is not None)
    extras = {} if order is None else {"order": order}
    method = METHODS.get("rtn")()
    return quantize_weight(weight, method, WeightSpec.parse(spec), surroundings=around, extras=extras)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "experts"])
def test_most_models_have_their_own_names(name):
    state = tiny(name).state_dict()
    assert stored_names(tiny(name), state) == {key: Piece(key) for key in state}


def test_plain_modules_have_their_own_names():
    model = nn.Sequential(nn.Linear(2, 2))
    assert stored_names(model, model.state_dict()) == {"0.weight": Piece("0.weight"), "0.bias": Piece("0.bias")}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pieces_are_what_transformers_saves(tmp_path, device):
    model = tiny("experts")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    pieces = stored_names(tiny("experts").to(device), model.state_dict())
    assert pieces.keys() == saved.keys()
    state = model.state_dict()
    for name, piece in pieces.items():
        assert torch.equal(piece.of(state[piece.name]), saved[name]), name
    gate = pieces["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    assert gate == Piece("model.layers.1.mlp.experts.gate_up_proj", 2, (0, 128))


def test_a_model_that_ptqc_loaded_keeps_its_list_of_conversions():
    model = tiny("experts")
    model._weight_conversions = []
    assert "model.layers.0.block_sparse_moe.gate.weight" in stored_names(model, model.state_dict())
    assert model._weight_conversions == []


def test_conversions_that_cannot_be_followed_are_said(monkeypatch, caplog):
    def fails(model, state):
        raise KeyError("no such rule")

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", fails)
    model = tiny("experts")
    assert stored_names(model, model.state_dict()) == {key: Piece(key) for key in model.state_dict()}
    assert "keep the names of the model" in caplog.text


def test_pieces_are_stacked():
    weight = torch.randn(2, 8, 64)
    whole = rounded(weight)
    pieces = [whole[0][:4], whole[0][4:], whole[1]]
    again = stacked(pieces, (2, 8, 64))
    assert torch.equal(again.dequantize(), whole.dequantize())
    assert again.spec == whole.spec


def test_orders_are_stacked_where_matrices_have_one():
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)).int() for seed in range(2)]
    weight = torch.randn(2, 8, 64)
    pieces = [rounded(weight[k], order=orders[k]) for k in range(2)]
    again = stacked(pieces, (2, 8, 64))
    assert torch.equal(again.extras["order"], torch.stack(orders))
    assert torch.equal(again.dequantize(), torch.stack([piece.dequantize() for piece in pieces]))
    assert stacked(pieces, (16, 64)) is None


@pytest.mark.parametrize("specs", [("int4g32", "int8g32"), ("nf4g32dq", "nf4g32dq"), ("fp8e4m3t", "fp8e4m3t")])
def test_other_pieces_are_not(specs):
    assert stacked([rounded(torch.randn(4, 64), spec) for spec in specs], (8, 64)) is None
