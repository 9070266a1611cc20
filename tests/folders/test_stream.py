import errno
import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptqc import quantize
from ptqc.errors import CheckpointError, PtqcError, SpecError, WeightError
from ptqc.folders.checkpoint import load, save
from ptqc.folders.shards import TensorWriter
from ptqc.folders.stream import quantize_folder
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.recipe import make_rule
from ptqc.spec import WeightSpec
from tests.tiny import logits, tiny

RTN = RoundToNearest()


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["plain", "tied", "transposed", "mixed"])
@pytest.mark.parametrize("spec", ["int4g64", "nf4g32dq", "int3g32z"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_folder_equals_loading_quantizing_and_saving(tmp_path, name, spec, dtype):
    model = tiny(name, dtype)
    model.save_pretrained(tmp_path / "source")
    recipe = [make_rule("*", RTN, spec=spec)]
    report = quantize_folder(tmp_path / "source", tmp_path / "out", recipe=recipe)
    whole = type(model).from_pretrained(tmp_path / "source")
    save(quantize(whole, recipe=recipe, progress=False), tmp_path / "whole")
    assert report.is_streamed
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert torch.equal(logits(load(tmp_path / "out")), logits(whole))


def test_the_reference_model_by_rows_and_whole(reference_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ptqc.methods._WEIGHTS_AT_ONCE", 100_000)
    quantize_folder(reference_folder, tmp_path / "out", method=RTN, include=["*proj*", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(reference_folder)
    save(quantize(model, "rtn", include=["*proj*", "lm_head"], progress=False), tmp_path / "whole")
    files = set(os.listdir(tmp_path / "whole"))
    assert files == set(os.listdir(tmp_path / "out"))
    for file in files - {"config.json"}:  # which names the version of transformers that wrote it
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_shards_progress_and_report(source, out):
    shutil.rmtree(source)
    tiny("plain", torch.bfloat16).save_pretrained(source, max_shard_size="50KB")
    seen = []
    report = quantize_folder(
        source, out, method=RTN, max_shard_bytes=30_000, exclude=["k_proj"], on_progress=lambda *step: seen.append(step)
    )
    total = sum(weight.nbytes for weight in tiny("plain", torch.bfloat16).parameters())
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][:2] == (total, total)
    assert report.source_bytes == total
    assert report.written_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert {entry.name for entry in report.skipped if entry.reason == "excluded"} == {
        f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)
    }
    assert len(report.weights) == 12
    assert all(file.stat().st_size < 35_000 for file in out.glob("*.safetensors"))
    assert torch.isfinite(logits(load(out))).all()


def test_scales_that_float16_cannot_hold_are_planned_for(source, out):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(source, lambda t: t[name].mul_(1e-6))
    report = quantize_folder(source, out, method=RTN)
    assert report.weights[name].spec.scale.dtype == "f32"
    assert torch.isfinite(logits(load(out))).all()


def test_merged_experts_are_loaded_whole_and_the_log_says_so(tmp_path, caplog):
    model = tiny("experts")
    model.save_pretrained(tmp_path / "source")
    seen = []
    with caplog.at_level(logging.WARNING, logger="ptqc"):
        report = quantize_folder(
            tmp_path / "source", tmp_path / "out", method=RTN, on_progress=lambda *step: seen.append(step)
        )
    assert "loading the whole model instead of one weight at a time" in caplog.text
    assert not report.is_streamed
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.weights
    assert seen[-1][0] == seen[-1][1]
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_rotations_are_streamed_too(source, out, tmp_path):
    rules = [make_rule("*", ["hadamard", "rtn"], bits=4, group_size=32)]
    report = quantize_folder(source, out, recipe=rules)
    assert report.is_streamed and all(weight.surroundings.input_rotation for weight in report.weights.values())
    whole = AutoModelForCausalLM.from_pretrained(source)
    save(quantize(whole, recipe=rules, progress=False), tmp_path / "whole")
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1]


def test_the_same_source_gives_the_same_bytes(source, out):
    quantize_folder(source, out, method=RTN)
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    quantize_folder(source, out, method=RTN, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first


def test_what_is_asked_must_make_sense(source, out):
    rule = make_rule("*", RTN)
    for arguments in ({}, {"spec": WeightSpec.parse("int4g64")}, {"method": RTN, "recipe": [rule]}):
        with pytest.raises(PtqcError, match="give either a method"):
            quantize_folder(source, out, **arguments)
    with pytest.raises(PtqcError, match="nothing would be quantized"):
        quantize_folder(source, out, method=RTN, include=["nothing"])
    with pytest.raises(SpecError, match="group 48 does not divide"):
        quantize_folder(source, out, recipe=[make_rule("*", RTN, spec="int4g48")])
    for target in (source, source.parent):
        with pytest.raises(CheckpointError, match="holds the model to quantize; write to another folder"):
            quantize_folder(source, target, method=RTN, overwrite=True)
    assert os.listdir(out.parent) == []


def quantized_already(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


def cut(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "complaint"),
    [
        (quantized_already, CheckpointError, r"already quantized \(gptq\); give the folder of the float model"),
        (cut, CheckpointError, "announces a header|bytes short"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, r"config\.json is missing"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), CheckpointError, "is a pickle"),
        (lambda f: rewrite(f, lambda t: t[UP].view(-1)[-1:].fill_(float("nan"))), WeightError, f'"{UP}" in .* NaN'),
        (lambda f: rewrite(f, lambda t: t[UP].view(-1)[:1].fill_(-float("inf"))), WeightError, f'"{UP}" .* infinite'),
        (lambda f: rewrite(f, lambda t: t.update({UP: t[UP].to(torch.int8)})), WeightError, "is torch.int8 in"),
        (lambda f: rewrite(f, lambda t: t.pop(UP)), CheckpointError, f"lacks {UP}"),
        (lambda f: rewrite(f, lambda t: t.update({UP: t[UP].mT.contiguous()})), CheckpointError, "json makes it"),
    ],
)
def test_a_spoiled_source_leaves_nothing(source, out, spoil, error, complaint):
    spoil(source)
    with pytest.raises(error, match=complaint) as caught:
        quantize_folder(source, out, method=RTN)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    assert os.listdir(out.parent) == []


def test_a_disk_that_fills_up_midway_leaves_nothing(source, out, monkeypatch):
    write, calls = TensorWriter._write, []

    def fail(self, position, data):
        calls.append(position)
        if len(calls) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, position, data)

    monkeypatch.setattr(TensorWriter, "_write", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device"):
        quantize_folder(source, out, method=RTN)
    assert os.listdir(out.parent) == []


def test_a_disk_too_small_is_noticed_before_writing(source, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(CheckpointError, match=r"out would take 0\.\d+ GB, but only 0\.000 GB are free"):
        quantize_folder(source, out, method=RTN)
    assert os.listdir(out.parent) == []


def test_an_interrupt_leaves_nothing_and_keeps_what_was_there(source, out):
    def interrupt(done, total, name):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_folder(source, out, method=RTN, on_progress=interrupt)
    assert os.listdir(out.parent) == []
    quantize_folder(source, out, method=RTN)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(source, out, method=RTN, overwrite=True, on_progress=interrupt)
    assert (out / "model.safetensors").read_bytes() == before
    assert os.listdir(out.parent) == ["out"]
