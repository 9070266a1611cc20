import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ptqc.errors import CheckpointError
from ptqc.folders.flatten import flatten_state_dict, unflatten_state_dict, untied
from ptqc.methods import quantize_weight
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from tests.surrounded import surrounded


def tied_model():
    torch.manual_seed(0)
    head = nn.Linear(64, 64, bias=False)
    model = nn.ModuleDict({"embed": nn.Embedding(64, 64), "norm": nn.LayerNorm(64), "head": head})
    quantized = quantize_weight(model["embed"].weight, RoundToNearest(), WeightSpec.parse("nf4g32dq"))
    model["embed"].weight = model["head"].weight = nn.Parameter(quantized, requires_grad=False)
    return model


def test_safetensors_itself_round_trips_what_flatten_gives(tmp_path):
    state = tied_model().state_dict()
    tensors, metadata = flatten_state_dict(state)
    assert not any(isinstance(tensor, QuantTensor) for tensor in tensors.values())
    assert {name for name in tensors if name.startswith("head")} == set()
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    again = unflatten_state_dict(load_file(tmp_path / "x.safetensors"), metadata)
    assert again.keys() == state.keys()
    assert again["embed.weight"] is again["head.weight"]
    assert again["embed.weight"].spec == state["embed.weight"].spec
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor)


def test_metadata_that_lies_is_refused():
    tensors, metadata = flatten_state_dict(tied_model().state_dict())
    cases = (({}, "no 'ptqc' in its metadata"), ({"ptqc": "{"}, "is no JSON"), ({"ptqc": "1"}, "not ptqc"))
    for broken, complaint in cases:
        with pytest.raises(CheckpointError, match=complaint):
            unflatten_state_dict(tensors, broken)
    with pytest.raises(CheckpointError, match=r"lacks embed\.weight\.scale_outer"):
        unflatten_state_dict({k: v for k, v in tensors.items() if k != "embed.weight.scale_outer"}, metadata)
    with pytest.raises(CheckpointError, match=r"ties head\.weight to gone"):
        unflatten_state_dict(tensors, {"ptqc": metadata["ptqc"].replace('"embed.weight"}', '"gone"}')})


def test_views_of_one_storage_are_tied_only_if_they_are_the_same_view():
    base = torch.arange(12.0).view(3, 4)
    empty = {"e": torch.empty(0), "f": torch.empty(0)}
    kept, tied = untied({"a": base, "b": base.view(3, 4), "c": base.t(), "d": base[:2]} | empty)
    assert list(kept) == ["a", "c", "d", "e", "f"]
    assert tied == {"b": "a"}


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"a": 1}, "is a dict; only tensors"),
        (torch.empty(2, device="meta"), "meta device"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.eye(2).to_sparse(), "only plain tensors"),
    ],
)
def test_what_no_file_can_hold_is_named(entry, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        flatten_state_dict({"x": entry})


def test_a_clash_of_part_names_is_an_error():
    quantized = quantize_weight(torch.randn(64, 64), RoundToNearest(), WeightSpec.parse("int4g64"))
    with pytest.raises(CheckpointError, match="has the name of another tensor"):
        flatten_state_dict({"w": quantized, "w.scale": torch.zeros(1)})


def test_what_stands_around_a_weight_is_flattened_too(tmp_path):
    state = {"w": surrounded("everything", (96, 64))[1], "v": surrounded("static", (96, 64))[1]}
    tensors, metadata = flatten_state_dict(state)
    assert {"w.order", "w.input_signs", "v.act_scale"} <= tensors.keys()
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    again = unflatten_state_dict(load_file(tmp_path / "x.safetensors"), metadata)
    assert all(torch.equal(again[name], weight) for name, weight in state.items())
