import json

import pytest
import torch
from safetensors.torch import save_file

from ptqc.errors import CheckpointError
from ptqc.folders.architecture import architecture_of, build_empty, planned_dtype
from ptqc.folders.folder import open_folder
from tests.tiny import tiny

CODE = """
import torch
from transformers import PreTrainedModel, PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
class Own(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(32, 32)
        self.post_init()
"""


@pytest.fixture
def folder(tmp_path):
    tiny("tied").save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return open_folder(folder)


def test_the_empty_model_has_shapes_and_ties_but_no_values(folder):
    model = build_empty(open_folder(folder))
    assert all(weight.is_meta for weight in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {n: w.shape for n, w in model.named_parameters()} == {n: w.shape for n, w in tiny("tied").named_parameters()}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"architectures": []}, "names no transformers architecture"),
        ({"architectures": [3]}, "names no transformers architecture"),
        ({"architectures": ["Nonesuch"]}, "asks for Nonesuch, which transformers"),
        ({"architectures": ["AutoModel"]}, "asks for AutoModel, which transformers"),
        ({"model_type": "nonesuch"}, "cannot build the model"),
        ({"num_attention_heads": 0}, "cannot build the model"),
        ({"vocab_size": -5}, "cannot build the model"),
        ({"vocab_size": 2**40}, r"a parameter weight of shape \[1099511627776, 64\], which the tensors of the folder"),
        ({"num_hidden_layers": 10**9}, "a model of more than .* parameters, the folder has 20 tensors"),
    ],
)
def test_configs_that_describe_no_model_are_named(folder, fields, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        build_empty(edit(folder, **fields))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_a_folder_runs_only_if_it_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "own.py").write_text(CODE)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}
    config = {"architectures": ["Own"], "model_type": "own", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"layer.weight": torch.zeros(32, 32), "layer.bias": torch.zeros(32)}, tmp_path / "model.safetensors")
    stored = open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="brings its own model code; read it, then ask for trust_remote_code"):
        architecture_of(stored)
    assert build_empty(stored, trust_remote_code=True).layer.weight.shape == (32, 32)


def test_parameters_that_an_architecture_keeps_in_float32():
    model = tiny("mixed")
    kept = {n for n, _ in model.named_parameters() if planned_dtype(model, n, torch.float16) == torch.float32}
    assert kept
    assert all(".wo." in name for name in kept)
    assert planned_dtype(model, min(kept), torch.bfloat16) == torch.bfloat16
