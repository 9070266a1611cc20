import errno
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptqc import quantize
from ptqc.engine import work
from ptqc.errors import CheckpointError, PtqcError, SpecError, WeightError
from ptqc.folders import staging
from ptqc.folders.architecture import build_unfilled
from ptqc.folders.artefacts import WorkFolder
from ptqc.folders.calibrated import quantize_folder_calibrated
from ptqc.folders.checkpoint import load, save
from ptqc.folders.finished import refuse_output
from ptqc.folders.folder import open_folder
from ptqc.folders.shards import TensorWriter
from ptqc.recipe import make_rule
from ptqc.sites import Skipped
from tests.tiny import logits, tiny

PIECES = {"gptq": 8, "awq": 4}  # scale groups keep layers together


def batches(count=2, tokens=24):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(128, (2, tokens), generator=generator)} for _ in range(count)]


def rules(method="gptq"):
    return [make_rule("*", method, group_size=32)]


def run(source, out, **options):
    return quantize_folder_calibrated(source, out, **({"recipe": rules(), "batches": batches()} | options))


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


class Died(BaseException):
    """Stands for a kill: nothing handles it."""


def die_at(when):
    """Progress that ends the run as soon as what is done is `when`."""

    def on_progress(done, total, what):
        if when in what:
            raise Died

    return on_progress


SLOW_AWQ = pytest.param("awq", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("plain", "gptq"),
        pytest.param("tied", "awq", marks=pytest.mark.slow),
        pytest.param("transposed", "gptq", marks=pytest.mark.slow),
    ],
)
def test_the_folder_equals_quantizing_in_memory_and_saving(tmp_path, name, method):
    model = tiny(name)
    model.save_pretrained(tmp_path / "source")
    report = run(tmp_path / "source", tmp_path / "out", recipe=rules(method))
    whole = type(model).from_pretrained(tmp_path / "source").eval()
    save(quantize(whole, recipe=rules(method), calibration=batches(), progress=False), tmp_path / "whole")
    assert report.is_streamed and report.pieces == PIECES[method] and report.resumed == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "out")), logits(whole))
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "whole"]


def test_changed_floats_have_the_type_of_the_source(source, out):
    run(source, out, recipe=rules("awq"))
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert after[norm].dtype == torch.bfloat16 and not torch.equal(after[norm], before[norm])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.isfinite(logits(load(out))).all()


@pytest.mark.parametrize("method", ["gptq", SLOW_AWQ])
@pytest.mark.parametrize(
    ("moment", "finished"),
    [("observing (piece 1", {}), ("layers.0.mlp.up_proj.weight", {"gptq": 2, "awq": 1}),
     ("running (piece 3", {"gptq": 3, "awq": 3}), ("model.norm.weight", PIECES)],
)  # fmt: skip
def test_a_run_that_died_goes_on_and_writes_the_same_bytes(source, out, tmp_path, method, moment, finished):
    finished = finished.get(method, 0)
    run(source, tmp_path / "undisturbed", recipe=rules(method))
    with pytest.raises(Died):
        run(source, out, recipe=rules(method), on_progress=die_at(moment))
    assert os.listdir(out.parent) == [".out.ptqc-work"]
    assert len(list((out.parent / ".out.ptqc-work").glob("*.safetensors"))) == finished
    report = run(source, out, recipe=rules(method))
    assert report.resumed == finished
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert os.listdir(out.parent) == ["out"]


def test_a_run_that_goes_on_reports_what_it_would_have_undisturbed(source, out, tmp_path, monkeypatch, caplog):
    """With so few rows that weights are quantized without data, and a weight that is left in float on the way."""
    choose = work.quantize_weight

    def fails(weight, *rest, name, **options):
        if name == "model.layers.0.self_attn.v_proj.weight":
            raise SpecError("it does not fit")
        return choose(weight, *rest, name=name, **options)

    monkeypatch.setattr(work, "quantize_weight", fails)
    given = {"recipe": [make_rule("*", ["bias_correction", "gptq"], bits=4, group_size=32)], "batches": batches(1, 8)}
    with caplog.at_level(logging.WARNING, logger="ptqc"):
        undisturbed = run(source, tmp_path / "undisturbed", **given)
        said = [record.message for record in caplog.records]
        caplog.clear()
        with pytest.raises(Died):
            run(source, out, **given, on_progress=die_at("running (piece 5"))
        assert not caplog.records
        report = run(source, out, **given)
    assert replace(report, resumed=0) == undisturbed and report.resumed == 5
    assert [record.message for record in caplog.records] == said == list(report.notes)
    assert any(note.startswith("14 weights") for note in report.notes)
    assert any("without a bias" in note for note in report.notes)
    assert Skipped("model.layers.0.self_attn.v_proj.weight", "it does not fit") in report.skipped


@pytest.mark.parametrize("given", [{}, pytest.param({"overwrite": True}, marks=pytest.mark.slow)], ids=["new", "over"])
def test_a_run_that_died_before_removing_its_work_folder_is_finished_by_the_next(
    source, out, tmp_path, monkeypatch, caplog, given
):
    def die(self):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", die)
        with pytest.raises(Died):
            run(source, out, **given)
    assert sorted(os.listdir(out.parent)) == [".out.ptqc-work", "out"]
    files = {file.name: file.stat() for file in out.iterdir()}
    refuse_output(out, overwrite=False)
    with pytest.raises(CheckpointError, match="not empty"):
        run(source, out, recipe=rules("rtn"))
    with pytest.raises(CheckpointError, match="not empty"):
        run(source, out, max_shard_bytes=30_000)
    with caplog.at_level(logging.WARNING, logger="ptqc"):
        report = run(source, out, **given)
    assert "out is complete already; removed" in caplog.text
    assert os.listdir(out.parent) == ["out"]
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == {
        name: state.st_mtime_ns for name, state in files.items()
    }
    undisturbed = run(source, tmp_path / "undisturbed")
    assert replace(report, resumed=0) == undisturbed
    with pytest.raises(CheckpointError, match="not empty"):
        run(source, out)


@pytest.mark.parametrize("moment", ["before the output is in place", "the output was changed since"])
def test_only_an_output_that_is_whole_is_taken_for_finished(source, out, monkeypatch, moment):
    def die(*_):
        raise Died

    with monkeypatch.context() as patch:
        place = (staging, "_put_in_place") if "before" in moment else (WorkFolder, "remove")
        patch.setattr(*place, die)
        with pytest.raises(Died):
            run(source, out)
    if "before" in moment:
        assert run(source, out).resumed == PIECES["gptq"] and os.listdir(out.parent) == ["out"]
        return
    spoil_last_byte(out / "model.safetensors")
    with pytest.raises(CheckpointError, match="not empty"):
        run(source, out)
    with pytest.raises(CheckpointError, match="not empty"):
        refuse_output(out, overwrite=False)
    assert run(source, out, overwrite=True).resumed == PIECES["gptq"]


def spoil_last_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_corrupted_piece_is_made_again_and_those_behind_it_stay(source, out, tmp_path):
    run(source, tmp_path / "undisturbed")
    with pytest.raises(Died):
        run(source, out, on_progress=die_at("model.norm.weight"))
    spoil_last_byte(out.parent / ".out.ptqc-work" / "piece-00001.safetensors")
    report = run(source, out)
    assert report.resumed == PIECES["gptq"] - 1  # it came out as before, so the pieces behind it are still right
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "change",
    [
        {"batches": batches(1)},
        {"recipe": rules("rtn")},
        {"recipe": [make_rule("*", "gptq", group_size=64)]},
        {"exclude": ["v_proj"]},
    ],
    ids=["batches", "method", "options", "exclude"],
)
def test_pieces_of_another_request_are_not_used(source, out, tmp_path, change):
    with pytest.raises(Died):
        run(source, out, on_progress=die_at("model.norm.weight"))
    report = run(source, out, **change)
    assert report.resumed == 0
    run(source, tmp_path / "undisturbed", **change)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_pieces_of_another_source_are_not_used(source, out):
    with pytest.raises(Died):
        run(source, out, on_progress=die_at("model.norm.weight"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(2)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert run(source, out).resumed == 0


def test_a_full_disk_keeps_the_finished_pieces(source, out, monkeypatch):
    write, calls = WorkFolder.write, []

    def fail(self, index, *rest):
        calls.append(index)
        if index == 2:
            with monkeypatch.context() as patch:
                patch.setattr(TensorWriter, "_write", no_space)
                return write(self, index, *rest)
        return write(self, index, *rest)

    def no_space(self, position, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "write", fail)
        with pytest.raises(CheckpointError, match="No space left on device; free some space"):
            run(source, out)
    assert calls == [0, 1, 2]
    assert run(source, out).resumed == 2


def test_a_disk_too_small_for_the_output_keeps_the_finished_pieces(source, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
        with pytest.raises(CheckpointError, match=r"out would take 0\.\d+ GB"):
            run(source, out)
    assert run(source, out).resumed == PIECES["gptq"]


def test_a_second_run_for_the_same_output_is_refused(source, out):
    out.parent.mkdir(exist_ok=True)
    with (
        WorkFolder(out.parent / ".out.ptqc-work", "other"),
        pytest.raises(CheckpointError, match="in use by another run for the same output"),
    ):
        run(source, out)


def test_the_work_folder_may_be_elsewhere(source, out, tmp_path):
    with pytest.raises(Died):
        run(source, out, work_dir=tmp_path / "pieces", on_progress=die_at("model.norm.weight"))
    assert os.listdir(out.parent) == []
    assert run(source, out, work_dir=tmp_path / "pieces").resumed == PIECES["gptq"]
    assert not (tmp_path / "pieces").exists()


def test_shards_progress_and_report(source, out):
    seen = []
    report = run(source, out, max_shard_bytes=30_000, exclude=["k_proj"], on_progress=lambda *step: seen.append(step))
    amounts = [done for done, _, _ in seen]
    assert amounts == sorted(amounts) and seen[-1][:2] == (report.source_bytes, report.source_bytes)
    assert len(report.weights) == 12
    assert {entry.reason for entry in report.skipped if "k_proj" in entry.name} == {"excluded"}
    assert report.written_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert len(list(out.glob("*.safetensors"))) > 1


def test_merged_experts_are_loaded_whole_and_the_log_says_so(tmp_path, caplog):
    tiny("experts").save_pretrained(tmp_path / "source")
    with caplog.at_level(logging.WARNING, logger="ptqc"):
        report = run(tmp_path / "source", tmp_path / "out")
    assert "loading the whole model instead of a piece at a time" in caplog.text
    assert not report.is_streamed
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.weights
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_batches_of_several_shapes_are_loaded_whole(source, out, caplog):
    report = run(source, out, batches=[*batches(1), *batches(1, tokens=40)])
    assert "batches differ in shape" in caplog.text and not report.is_streamed


def test_what_is_asked_must_make_sense(source, out):
    with pytest.raises(PtqcError, match="nothing would be quantized"):
        run(source, out, include=["nothing"])
    with pytest.raises(PtqcError, match="no calibration data"):
        run(source, out, batches=[])
    with pytest.raises(SpecError, match="group 48 does not divide"):
        run(source, out, recipe=[make_rule("*", "gptq", spec="int4g48")])
    with pytest.raises(CheckpointError, match="write to another folder"):
        run(source, source, overwrite=True)


def test_a_weight_that_is_not_finite_is_named(source, out):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[-1:].fill_(float("nan"))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=f'"{name}"'):
        run(source, out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["plain", "tied", "transposed", "mixed"])
def test_an_unfilled_model_has_the_buffers_and_ties_of_a_loaded_one(tmp_path, name):
    model = tiny(name)
    model.save_pretrained(tmp_path / "source")
    loaded = type(model).from_pretrained(tmp_path / "source")
    unfilled = build_unfilled(open_folder(tmp_path / "source"))
    assert not unfilled.training
    stored, found = dict(loaded.named_buffers()), dict(unfilled.named_buffers())
    assert stored.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in stored.items())
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in unfilled.named_parameters()]
    assert {weight.dtype for weight in unfilled.parameters()} == {torch.float32}
