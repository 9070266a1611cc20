"""Folders that other programs quantized: what they become, and what happens where they lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ptqc
from ptqc.act_spec import ActSpec
from ptqc.codegen.dialect import DIALECTS
from ptqc.errors import CheckpointError
from ptqc.surroundings import Surroundings
from tests.export._folders import UP, ordered, quantized, with_experts
from tests.tiny import logits, tiny

STATIC = ActSpec(dtype="int8", scale="tensor", is_static=True)


@pytest.fixture
def folder(tmp_path):
    """A folder in GPTQ, and its model."""
    model = ordered("int4g32z")
    ptqc.export(model, "gptq", tmp_path / "gptq")
    return tmp_path / "gptq", model


def edit(folder: Path, **fields: Any) -> None:
    """Change the `quantization_config`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def retensor(folder: Path, change) -> None:
    """Change the tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_model_of_another_program_is_a_model_of_ours(folder, tmp_path):
    model = ptqc.load(folder[0])
    weight = model.get_submodule(UP).weight
    assert str(weight.spec) == "int4g32z" and weight.surroundings.order
    assert not any(weight.is_meta for weight in model.state_dict().values())
    assert model.lm_head.weight.requires_grad and not model.training
    assert model.config._name_or_path == str(folder[0]) and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(ptqc.load(tmp_path / "ours")), logits(model), rtol=0, atol=0)


@pytest.mark.slow
def test_it_is_lowered(folder):
    up = ptqc.load(folder[0]).get_submodule(UP)
    x = torch.randn(3, 64)
    compiled = torch.compile(up, backend="ptqc", options={"exact": True})
    torch.testing.assert_close(compiled(x), up(x), rtol=1e-4, atol=1e-4)


def test_dtypes(folder):
    model = ptqc.load(folder[0], dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.get_submodule(UP).weight.scale.dtype == torch.float16
    assert model.config.dtype == torch.bfloat16


def test_a_skeleton_is_filled(folder):
    model = ptqc.load(folder[0], model=tiny("plain"))
    torch.testing.assert_close(logits(model), logits(folder[1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"does not fit the skeleton: 1 tensors missing .*, 17 too many|too many"):
        ptqc.load(folder[0], model=nn.Linear(4, 4))


def test_g_idx_may_be_missing(tmp_path):
    model = quantized("int4g32")
    ptqc.export(model, "gptq", tmp_path / "out")
    retensor(tmp_path / "out", lambda tensors: [tensors.pop(n) for n in list(tensors) if n.endswith("g_idx")])
    torch.testing.assert_close(logits(ptqc.load(tmp_path / "out")), logits(model), rtol=0, atol=0)
    edit(tmp_path / "out", bits=8)
    with pytest.raises(CheckpointError, match="make no sense"):
        ptqc.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop(f"{UP}.scales"), 'of "model.layers.0.mlp.up_proj.weight" make no sense: there is no scales'),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1]}), "do not fit 128 outputs"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()}), "its scales are torch.int32"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:5]}), "5 words hold no 64 codes"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].float()}), "matrices of int32"),
        (lambda t: t[f"{UP}.g_idx"].fill_(0), "does not put 32 inputs into every group"),
        (lambda t: t[f"{UP}.g_idx"].add_(5), "groups outside 0 .. 1"),
        (lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].float()}), "no row of whole numbers"),
        (lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].cfloat()}), "no row of whole numbers"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}), "is stored as torch.int32"),
        (lambda t: [t.pop(name) for name in list(t) if UP in name], f"lacks {UP}.weight"),
        (lambda t: [t.pop(name) for name in list(t) if "qweight" in name], "no tensor is called"),
    ],
)
def test_tensors_that_lie_are_named(folder, change, fault):
    retensor(folder[0], change)
    with pytest.raises(CheckpointError, match=fault) as caught:
        ptqc.load(folder[0])
    assert str(folder[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"quant_method": "awq", "version": "gemm", "bits": 4}, "make no sense"),
        ({"quant_method": "aqlm"}, "quantized by 'aqlm', not one of ptqc, awq, bitsandbytes, compressed-tensors"),
        ({"quant_method": None}, "quantized by None"),
        ({"checkpoint_format": "marlin"}, "GPTQ format 'marlin' is not known"),
    ],
)
def test_configs_that_lie_are_named(folder, fields, fault):
    edit(folder[0], **fields)
    with pytest.raises(CheckpointError, match=fault):
        ptqc.load(folder[0])


def test_another_architecture_is_named(folder):
    path = folder[0] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"of shape .* config.json makes it"):
        ptqc.load(folder[0])


def test_truncated_files(folder, tmp_path):
    whole = (folder[0] / "model.safetensors").read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder[0] / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|short|damaged|announces"):
            ptqc.load(folder[0])


def test_static_scales_are_positive(tmp_path):
    model = quantized("int8", Surroundings(act=STATIC), act_scale=lambda _: torch.tensor(0.05))
    ptqc.export(model, "compressed-tensors", tmp_path / "out")
    retensor(tmp_path / "out", lambda t: t[f"{UP}.input_scale"].fill_(-1))
    with pytest.raises(CheckpointError, match="act_scale must hold a positive number"):
        ptqc.load(tmp_path / "out")
    retensor(tmp_path / "out", lambda t: t.pop(f"{UP}.input_scale"))
    with pytest.raises(CheckpointError, match="there is no input_scale"):
        ptqc.load(tmp_path / "out")


@pytest.fixture
def experts(tmp_path):
    """A folder of a model with experts, and its model."""
    model = with_experts("int4g32")
    ptqc.export(model, "gptq", tmp_path / "experts")
    return tmp_path / "experts", model


EXPERT = "model.layers.0.block_sparse_moe.experts.2.w3"


def test_experts_of_several_specs_become_floats(experts, caplog):
    other = with_experts("int8g32")
    weight = other.model.layers[0].mlp.experts.gate_up_proj[2][128:]
    tails = DIALECTS.get("gptq")("gptq").write(weight)
    retensor(experts[0], lambda tensors: tensors.update({f"{EXPERT}.{tail}": v for tail, v in tails.items()}))
    found = ptqc.load(experts[0])
    assert "mlp.experts.gate_up_proj: its pieces are not quantized alike" in caplog.text
    packed = found.model.layers[0].mlp.experts
    assert not isinstance(packed.gate_up_proj, ptqc.QuantTensor) and isinstance(packed.down_proj, ptqc.QuantTensor)
    expected = experts[1].model.layers[0].mlp.experts.gate_up_proj.dequantize()
    expected[2, 128:] = weight.dequantize()
    torch.testing.assert_close(packed.gate_up_proj, nn.Parameter(expected), rtol=0, atol=0)


def test_missing_experts_are_named(experts):
    retensor(experts[0], lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(EXPERT)])
    with pytest.raises(CheckpointError, match=rf"the model needs {EXPERT}.weight of shape \[128, 64\], .* lacks it"):
        ptqc.load(experts[0])
