"""Where weights go: names, orders of rows, experts in one parameter, transposed weights; and how they are read."""

import gguf
import pytest
import torch
from gguf import MODEL_TENSOR
from torch import nn

from ptqc.codegen.export._gguf_architectures import ARCHITECTURES, architecture_of
from ptqc.codegen.export._gguf_placement import placements
from ptqc.errors import ExportError
from tests.export._models import EXPERTS, small_model, stored


def placed(model, read=None):
    """Placements by the name of the tensor."""
    return {at.stored_name: at for at in placements(architecture_of(model), model, read)}


def test_only_queries_and_keys_change_their_order_and_codes_follow():
    model = small_model()
    layer = model.model.layers[0].self_attn
    plain = layer.k_proj.weight.detach().clone()
    layer.k_proj.weight = nn.Parameter(stored(plain, "int4g32"), requires_grad=False)
    placed = {at.name: at for at in placements(architecture_of(model), model)}
    assert {at.role for at in placed.values() if at.rows is not None} == {MODEL_TENSOR.ATTN_Q, MODEL_TENSOR.ATTN_K}
    at = placed["model.layers.0.self_attn.k_proj.weight"]
    expected = layer.k_proj.weight.dequantize().view(2, 2, 8, 64).transpose(1, 2).reshape(32, 64)
    assert at.stored_name == "blk.0.attn_k.weight"
    assert torch.equal(at.band(0, 32).dequantize(), expected)
    assert at.band(0, 32).spec == layer.k_proj.weight.spec


def test_tied_weights_are_placed_once_and_the_model_is_not_touched():
    model = small_model(tie_word_embeddings=True)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    names = [at.stored_name for at in placements(architecture_of(model), model)]
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_every_name_is_one_of_the_architecture():
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        model = small_model(family, **({"sliding_window": None} if family == "Mistral" else {}))
        architecture = architecture_of(model)
        kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        assert {at.role for at in placements(architecture, model)} <= set(gguf.MODEL_TENSORS[kind])


def test_weights_without_a_place_are_an_error():
    model = small_model()
    model.model.layers[0].mlp.adapter = nn.Linear(4, 4)
    with pytest.raises(ExportError, match=r"no place for model.layers.0.mlp.adapter.weight.*\(2 weights\)"):
        placements(ARCHITECTURES["llama"], model)


def test_gates_and_ups_of_packed_experts_become_two_tensors():
    model = small_model("Mixtral", **EXPERTS)
    packed = model.model.layers[1].mlp.experts.gate_up_proj.detach()
    gates, ups = (placed(model)[f"blk.1.ffn_{name}_exps.weight"] for name in ("gate", "up"))
    assert gates.shape == ups.shape == (4, 96, 64)
    assert torch.equal(gates.band(0, 4 * 96).view(gates.shape), packed[:, :96])
    assert torch.equal(ups.band(0, 4 * 96).view(ups.shape), packed[:, 96:])


def test_interleaved_and_transposed_experts_are_known_by_what_their_module_says():
    model = small_model("Mixtral", **EXPERTS)
    experts = model.model.layers[0].mlp.experts
    packed = experts.gate_up_proj.detach()
    experts.is_concatenated, experts.is_transposed = False, True
    experts.gate_up_proj = nn.Parameter(packed.mT.contiguous())
    gates, ups = (placed(model)[f"blk.0.ffn_{name}_exps.weight"] for name in ("gate", "up"))
    assert torch.equal(gates.band(0, 4 * 96).view(gates.shape), packed[:, 0::2])
    assert torch.equal(ups.band(0, 4 * 96).view(ups.shape), packed[:, 1::2])


def test_stored_experts_are_cut_with_their_codes():
    model = small_model("Mixtral", **EXPERTS)
    experts = model.model.layers[0].mlp.experts
    weight = stored(experts.gate_up_proj.detach(), "int4g32")
    experts.gate_up_proj = nn.Parameter(weight, requires_grad=False)
    at = placed(model)["blk.0.ffn_up_exps.weight"]
    band = at.band(0, 4 * 96)
    assert band.spec == weight.spec
    assert torch.equal(band.dequantize().view(at.shape), weight.dequantize()[:, 96:])


def test_transposed_weights_are_turned():
    model = small_model("GPT2")
    layer = model.transformer.h[0].attn.c_attn
    at = placed(model)["blk.0.attn_qkv.weight"]
    assert at.shape == (192, 64)
    assert torch.equal(at.band(3, 70), layer.weight.detach().T[3:70])
    weight = stored(layer.weight.detach(), "int4g32", is_transposed=True)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    band = placed(model)["blk.0.attn_qkv.weight"].band(3, 70)
    assert band.spec == weight.spec
    assert torch.equal(band.dequantize(), weight.dequantize().T[3:70])


def test_a_matrix_of_one_row_is_a_vector():
    found = placed(small_model("Qwen2Moe", **EXPERTS))
    assert found["blk.0.ffn_gate_inp_shexp.weight"].shape == (64,)


@pytest.mark.parametrize("family", ["Qwen2", "Mixtral", "GPT2"])
def test_bands_are_the_tensor_whatever_their_length(family):
    for at in placed(small_model(family, **(EXPERTS if family == "Mixtral" else {}), num_hidden_layers=1)).values():
        rows = at.matrix_shape[0]
        whole = at.band(0, rows)
        for step in (1 if rows < 300 else 100, 7, 64):
            bands = [at.band(start, min(start + step, rows)) for start in range(0, rows, step)]
            assert torch.equal(torch.cat(bands), whole), at.name


def test_values_come_from_the_reader_where_the_model_has_none():
    model, asked = small_model("Mixtral", **EXPERTS), []
    values = dict(model.named_parameters())

    def read(name, start, stop):
        asked.append((name, stop - start))
        return values[name].detach().reshape(-1, values[name].shape[-1])[start:stop]

    expected = placed(model)
    for name, at in placed(small_model("Mixtral", **EXPERTS).to("meta"), read).items():
        assert at.weight.is_meta
        assert torch.equal(at.band(0, 1), expected[name].band(0, 1))
    assert max(rows for _, rows in asked) == 1
