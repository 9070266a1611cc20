import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from ptqc import PtqcConfig, quantize
from ptqc.errors import CheckpointError, PtqcError
from ptqc.folders.checkpoint import load, save
from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from tests.surrounded import KINDS, extras_for, surroundings
from tests.tiny import IDS, MODELS, logits, tiny


def quantized(name, dtype=torch.float32, method="rtn", **options):
    batch = [{"input_ids": IDS}] if name == "experts" else None
    return quantize(tiny(name, dtype), method, calibration=batch, progress=False, **options)


def from_pretrained(name, folder, **options):
    return getattr(transformers, MODELS[name][0]).from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in MODELS for dtype in (torch.float32, torch.float16) if name != "experts"]
    + [("experts", torch.float16)],
)
def test_from_pretrained_and_save_pretrained_keep_every_bit(tmp_path, name, dtype):
    model = quantized(name, dtype)
    save(model, tmp_path / "ours")
    loaded = from_pretrained(name, tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "theirs")
    save(loaded, tmp_path / "again")
    for folder in ("theirs", "again"):
        assert torch.equal(logits(from_pretrained(name, tmp_path / folder)), logits(model))
        assert torch.equal(logits(load(tmp_path / folder)), logits(model))
        assert (tmp_path / folder / "config.json").read_bytes() == (tmp_path / "ours" / "config.json").read_bytes()


def test_the_reference_model_through_the_auto_class(reference_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(reference_folder)
    quantize(model, "rtn", spec="nf4g64dq", progress=False)
    save(model, tmp_path / "out")
    for options in ({}, {"device_map": "cpu"}, {"dtype": "auto"}, {"dtype": torch.float16}):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)), logits(model))


@pytest.mark.parametrize("spec", ["int3g32z", "fp8e4m3", "nf4g32dq", "ternaryg32", "int4g32f-bf16"])
def test_parts_are_never_cast(tmp_path, spec):
    model = quantized("transposed", torch.float16, spec=spec)
    save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loaded.dtype == torch.float32
    again = {n: w for n, w in loaded.named_parameters() if isinstance(w, QuantTensor)}
    before = {n: w for n, w in model.named_parameters() if isinstance(w, QuantTensor)}
    assert again.keys() == before.keys()
    for name, weight in again.items():
        assert weight.dtype == torch.float32
        for part, tensor in weight.parts.items():
            assert tensor.dtype == before[name].parts[part].dtype
            assert torch.equal(tensor.float(), before[name].parts[part].float())


def test_quantizing_while_loading_equals_quantizing_afterwards(reference_folder, tmp_path):
    config = PtqcConfig(method="rtn", bits=4, group_size=32, exclude=["*.layers.0.*"])
    loaded = AutoModelForCausalLM.from_pretrained(reference_folder, quantization_config=config)
    model = AutoModelForCausalLM.from_pretrained(reference_folder)
    quantize(model, "rtn", bits=4, group_size=32, exclude=["*.layers.0.*"], progress=False)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [(PtqcConfig(), "names no method"), (PtqcConfig(method="rtn", include=["nothing"]), "nothing would be quantized")],
)
def test_a_request_that_does_nothing_is_an_error(reference_folder, config, complaint):
    with pytest.raises(PtqcError, match=complaint):
        AutoModelForCausalLM.from_pretrained(reference_folder, quantization_config=config)


def test_a_model_quantized_in_memory_saves_itself(tmp_path):
    tiny("experts").save_pretrained(tmp_path / "float")  # as transformers stores it: expert by expert
    model = from_pretrained("experts", tmp_path / "float")
    quantize(model, "rtn", calibration=[{"input_ids": IDS}], progress=False)
    model.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_the_base_model_without_its_head(tmp_path):
    model = quantized("plain", include=["*"])
    save(model, tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    save(base, tmp_path / "base")
    assert torch.equal(load(tmp_path / "base")(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_dequantize_gives_an_ordinary_model(tmp_path):
    model = quantized("tied", include=["*"])
    save(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    assert not any(isinstance(weight, QuantTensor) for weight in plain.parameters())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_device_maps_know_what_quantized_weights_take(tmp_path):
    model = quantized("plain")
    save(model, tmp_path / "out")
    quantizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out").hf_quantizer
    weight = model.model.layers[0].mlp.down_proj.weight
    name = "model.layers.0.mlp.down_proj.weight"
    assert quantizer.param_element_size(None, name, weight) * weight.numel() == weight.nbytes
    assert quantizer.param_element_size(None, "other", torch.zeros(3)) == 4


def test_offloading_is_refused(tmp_path):
    save(quantized("plain"), tmp_path / "out")
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(PtqcError, match=r"offloads to .*disk"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=device_map)


def test_faults_are_found_before_a_tensor_is_read(tmp_path):
    save(quantized("plain"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = config["quantization_config"]["weights"]
    name = "model.layers.0.mlp.up_proj.weight"
    for change, complaint in (
        ({name: weights[name] | {"spec": "int8"}}, "disagree"),
        ({name: weights[name] | {"spec": "nonsense"}}, "no weight spec"),
        ({name: None}, f"lacks {name}"),
    ):
        changed = {key: row for key, row in (weights | change).items() if row is not None}
        spoiled = config | {"quantization_config": config["quantization_config"] | {"weights": changed}}
        (tmp_path / "out" / "config.json").write_text(json.dumps(spoiled))
        with pytest.raises(CheckpointError, match=complaint):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")


REGISTERED = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING; assert 'ptqc' in AUTO_QUANTIZER_MAPPING"


@pytest.mark.parametrize("imports", ["ptqc, transformers", "transformers.modeling_utils, ptqc"])
def test_the_order_of_imports_does_not_matter(imports):
    subprocess.run([sys.executable, "-c", f"import {imports}; {REGISTERED}"], check=True)


def test_importing_ptqc_imports_neither_torch_nor_transformers():
    code = "import ptqc, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["tied", "transposed", "experts"])
def test_surroundings_go_round(tmp_path, name):
    model, rtn = tiny(name, torch.float16), METHODS.get("rtn")()
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim > 1 and min(p.shape[-2:]) > 32]
    for (path, weight), kind in zip(matrices, KINDS * len(matrices), strict=False):
        shape, is_transposed = tuple(weight.shape), "c_" in path
        shape = (shape[1], shape[0]) if is_transposed else shape
        around = surroundings(kind, shape)
        stored = quantize_weight(weight, rtn, WeightSpec.parse("int8g32"), is_transposed=is_transposed,
                                 surroundings=around, extras=extras_for(around, shape))  # fmt: skip
        owner, _, attribute = path.rpartition(".")
        model.get_submodule(owner)._parameters[attribute] = torch.nn.Parameter(stored, requires_grad=False)
    model.tie_weights()
    expected = logits(model)
    assert not expected.isnan().any()
    save(model, tmp_path / "ours")
    from_pretrained(name, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(from_pretrained(name, tmp_path / folder)), expected)
        assert torch.equal(logits(load(tmp_path / folder)), expected)
        assert torch.equal(logits(load(tmp_path / folder, model=tiny(name, torch.float16))), expected)
    file = tmp_path / "ours" / "config.json"
    file.write_text(file.read_text().replace('"order": true', '"order": false'))
    with pytest.raises(CheckpointError, match=r"holds .*\.order, but quantization_config lacks"):
        load(tmp_path / "ours")
