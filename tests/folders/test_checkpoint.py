import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptqc import quantize
from ptqc.errors import CheckpointError
from ptqc.folders.checkpoint import load, save
from ptqc.folders.shards import TensorWriter
from ptqc.qtensor import QuantTensor
from tests.tiny import IDS, MODELS, logits, tiny


def quantized(name: str, dtype: torch.dtype = torch.float32, method: str = "rtn", **options):
    model = tiny(name, dtype)
    batch = [{"input_ids": IDS}] if name == "experts" else None
    return quantize(model, method, calibration=batch, progress=False, **options)


def same_files(one, other, *names):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


DTYPES = {"experts": [torch.bfloat16]}  # one: finding experts runs the model through dynamo, which takes seconds


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in MODELS for dtype in DTYPES.get(name, [torch.float32, torch.float16, torch.bfloat16])],
)
def test_logits_are_the_same_bit_for_bit_also_after_a_second_save(tmp_path, name, dtype):
    model = quantized(name, dtype)
    save(model, tmp_path / "one")
    again = load(tmp_path / "one")
    save(again, tmp_path / "two")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load(tmp_path / "two")), logits(model))
    assert same_files(tmp_path / "one", tmp_path / "two", "config.json", "model.safetensors")


def promised_bytes(model: nn.Module) -> float:
    weights = model.parameters()
    return sum(
        w.numel() * (w.spec.bits_per_weight / 8 if isinstance(w, QuantTensor) else w.element_size()) for w in weights
    )


@pytest.mark.parametrize("spec", ["int4g64", "int3g64z", "nf4g64", "nf4g64dq", "ternaryg128", "int8", "fp8e4m3"])
def test_memory_and_folder_take_what_bits_per_weight_promises(reference_folder, tmp_path, spec):
    model = AutoModelForCausalLM.from_pretrained(reference_folder)
    quantize(model, "rtn", spec=spec, progress=False)
    save(model, tmp_path / "out")
    held = sum(w.nbytes for w in model.parameters())
    stored = sum((tmp_path / "out" / file).stat().st_size for file in ("model.safetensors", "config.json"))
    assert held == pytest.approx(promised_bytes(model), rel=0.01)
    assert stored == pytest.approx(promised_bytes(model), rel=0.01)


def test_everything_beside_the_weights_is_there(reference_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(reference_folder)
    quantize(model, "rtn", progress=False)
    save(model, tmp_path / "out")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    model.config._name_or_path = "nowhere"
    save(model, tmp_path / "given", tokenizer=AutoTokenizer.from_pretrained(reference_folder))
    assert names <= {file.name for file in (tmp_path / "given").iterdir()}
    one, other = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "given", reference_folder))
    assert one("def f(x):") == other("def f(x):")


def test_shards(tmp_path):
    model = quantized("plain")
    save(model, tmp_path / "out", max_shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = quantized("tied", include=["*"])
    assert isinstance(model.lm_head.weight, QuantTensor)
    save(model, tmp_path / "out")
    index = load(tmp_path / "out")
    assert index.lm_head.weight is index.model.embed_tokens.weight
    assert torch.equal(logits(index), logits(model))
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    save(quantized("plain", include=["*"]), tmp_path / "untied")
    assert stored < (tmp_path / "untied" / "model.safetensors").stat().st_size - model.lm_head.weight.nbytes // 2


@pytest.mark.parametrize("name", ["tied", "plain"])
def test_ties_that_the_config_does_not_know_hold_as_well(tmp_path, name):
    model = quantized(name)
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(embedding.detach().clone() * 2) if name == "tied" else embedding
    save(model, tmp_path / "out")
    for again in (load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert torch.equal(logits(again), logits(model))
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == (name == "plain")


def test_tensors_of_several_dtypes_keep_theirs(tmp_path):
    model = quantized("plain", torch.float16)
    model.model.norm.float()
    save(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.model.norm.weight.dtype == torch.float32
    assert again.dtype == torch.float16
    cast = load(tmp_path / "out", dtype=torch.float32)
    assert {weight.dtype for weight in cast.parameters()} == {torch.float32}
    assert cast.model.layers[0].mlp.up_proj.weight.scale.dtype == torch.float16


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    model = quantized("plain")
    save(torch.compile(model), tmp_path / "compiled")
    save(model, tmp_path / "eager")
    assert same_files(tmp_path / "compiled", tmp_path / "eager", "config.json", "model.safetensors")


def test_a_float_model_is_an_ordinary_folder(tmp_path):
    model = tiny("plain")
    save(model, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


# -------------------------------------------------------------------- hostile folders


@pytest.fixture
def saved(tmp_path):
    """A good folder to spoil."""
    save(quantized("plain"), tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def shorten(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


WEIGHT = "model.layers.1.mlp.up_proj.weight"


def weights(config):
    return config["quantization_config"]["weights"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (shorten, r"model\.safetensors is damaged: it is 100 bytes short"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is no valid JSON"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "is a pickle"),
        (lambda folder: edit(folder, lambda c: c.pop("architectures")), "names no transformers architecture"),
        (lambda folder: edit(folder, lambda c: c.update(architectures=["os"])), "asks for os, which transformers"),
        (lambda folder: edit(folder, lambda c: c.update(architectures=["AutoConfig"])), "asks for AutoConfig"),
        (lambda folder: edit(folder, lambda c: c.update(auto_map={"AutoModel": "x.Y"})), "brings its own model code"),
        (lambda folder: edit(folder, lambda c: c.update(hidden_size="wide")), "cannot build the model"),
        (lambda folder: edit(folder, lambda c: c.update(num_attention_heads=0)), "cannot build the model"),
        (lambda folder: edit(folder, lambda c: c.update(num_hidden_layers=3)), r"lacks model\.layers\.2"),
        (lambda folder: edit(folder, lambda c: c.update(hidden_size=32)), "the architecture has|cannot build"),
        (lambda folder: edit(folder, lambda c: c.update(quantization_config={"quant_method": "aqlm"})), "'aqlm', not"),
        (lambda folder: edit(folder, lambda c: c.update(quantization_config={"quant_method": "hqq"})), "hqq, but"),
        (lambda folder: edit(folder, lambda c: weights(c)[WEIGHT].update(spec="int5x")), "'int5x' is no weight spec"),
        (lambda folder: edit(folder, lambda c: weights(c)[WEIGHT].update(spec="int8")), "and the tensors disagree"),
        (lambda folder: edit(folder, lambda c: weights(c)[WEIGHT].update(shape=[64, 128])), "and the tensors disagree"),
        (lambda folder: edit(folder, lambda c: weights(c).update(ghost=weights(c)[WEIGHT])), r"lacks ghost\.codes"),
        (lambda folder: edit(folder, lambda c: weights(c).pop(WEIGHT)), f"config lacks {WEIGHT}"),
    ],
)
def test_spoiled_folders_are_refused_in_one_line_that_names_the_file(saved, spoil, complaint):
    spoil(saved)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------- outputs that fail


def test_what_is_not_ours_is_not_overwritten(tmp_path, saved):
    model = quantized("tied")
    with pytest.raises(CheckpointError, match="not empty"):
        save(model, saved)
    save(model, saved, overwrite=True)
    assert torch.equal(logits(load(saved)), logits(model))


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, position, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorWriter, "_write", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device; free some space"):
        save(quantized("plain"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_disk_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    monkeypatch.setattr(TensorWriter, "__init__", None)  # must not be reached
    with pytest.raises(CheckpointError, match=r"out would take 0\.\d+ GB, but only 0\.000 GB are free"):
        save(quantized("plain"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_of_the_system_leaves_nothing(tmp_path):
    code = (
        "import sys, torch; from torch import nn; from ptqc.folders.checkpoint import save\n"
        "from ptqc.errors import CheckpointError\n"
        "try: save(nn.Linear(512, 512), sys.argv[1])\n"
        "except CheckpointError as error: print(error)"
    )
    limit = 100_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    run = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert "File too large; choose a disk that holds larger files" in run.stdout
    assert os.listdir(tmp_path) == []


def test_models_that_no_folder_can_hold_are_refused(tmp_path):
    model = quantized("plain")
    model.to("meta")
    with pytest.raises(CheckpointError, match="meta device"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_recipe_is_saved_with_the_model(tmp_path):
    model = quantize(tiny("plain"), "rtn", bits=3, group_size=32, progress=False)
    save(model, tmp_path / "first")
    save(load(tmp_path / "first"), tmp_path / "second")
    for folder in ("first", "second"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["quantization_config"]["recipe"] == [
            {"pattern": "*", "method": "rtn", "bits": 3, "group_size": 32, "activation": "float"}
        ]
