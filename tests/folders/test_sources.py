import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptqc.errors import CheckpointError
from ptqc.folders.architecture import build_empty
from ptqc.folders.folder import open_folder
from ptqc.folders.sources import direct_sources
from tests.tiny import tiny


def found(folder):
    stored = open_folder(folder)
    return direct_sources(build_empty(stored), stored)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["plain", "tied", "transposed", "mixed"])
def test_every_parameter_has_the_tensor_that_transformers_gives_it(tmp_path, name):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    sources = found(tmp_path)
    assert list(sources.entries) == [n for n in model.state_dict() if n not in sources.tied]
    for parameter, entry in sources.entries.items():
        assert torch.equal(entry.read(), model.state_dict()[parameter])
    for alias, first in sources.tied.items():
        assert model.get_parameter(alias) is model.get_parameter(first)


def test_a_base_model_s_folder_gets_the_prefix_of_the_model_with_a_head(tmp_path):
    model = tiny("transposed")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: [t.__setitem__(n.removeprefix("transformer."), t.pop(n)) for n in list(t)])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {n: e.read().sum() for n, e in found(tmp_path).entries.items()} == {
        n: w.sum() for n, w in loaded.named_parameters()
    }


def test_merged_experts_are_a_reason_to_load_the_model_whole(tmp_path):
    tiny("experts").save_pretrained(tmp_path)
    assert "is converted while it is loaded" in found(tmp_path)


def test_tied_weights_may_be_stored_twice_if_they_agree(tmp_path):
    tiny("tied").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert found(tmp_path).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    rewrite(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    assert "stored twice with different values" in found(tmp_path)


def test_what_does_not_fit_is_an_error_and_what_is_too_much_is_left_out(tmp_path):
    tiny("plain").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update(surplus=torch.zeros(2)))
    assert "surplus" not in found(tmp_path).entries
    rewrite(tmp_path, lambda t: t.update({"model.norm.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of shape \(3,\), config\.json makes it \(64,\)"):
        found(tmp_path)
    rewrite(tmp_path, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight \(1 missing\)"):
        found(tmp_path)
