"""Exports from folders: files that are written while the model stays on disk, and runs that end before their time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import ptqc
from ptqc import exports
from ptqc.errors import ExportError
from tests.export._models import EXPERTS, small_model
from tests.export.test_gguf_tokenizer import byte_level

pytest.importorskip("gguf")
SMALL = {"vocab_size": 700}


def save_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=byte_level()).save_pretrained(folder)


def write_folder(folder, family="Llama", **changes):
    """A model folder with a tokenizer; its model."""
    model = small_model(family, **(SMALL | changes)).bfloat16()
    model.save_pretrained(folder, max_shard_size="300KB")
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize(("family", "changes"), [
    ("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Qwen2", {}), ("GPT2", {}), ("Mixtral", EXPERTS),
    ("Qwen2Moe", EXPERTS),
])  # fmt: skip
@pytest.mark.parametrize("quant", ["Q4_K_M", None])
def test_a_folder_gives_the_file_that_its_loaded_model_gives(tmp_path, monkeypatch, family, changes, quant):
    write_folder(tmp_path / "m", family, **changes)
    ptqc.export(ptqc.load(tmp_path / "m"), "gguf", tmp_path / "a.gguf", quant=quant, tokenizer=tmp_path / "m")
    monkeypatch.setattr(exports, "load", lambda *_, **__: pytest.fail("the model was loaded whole"))
    report = ptqc.export(tmp_path / "m", "gguf", tmp_path / "b.gguf", quant=quant)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert {tensor.fate for tensor in report.tensors} == ({"lossless"} if quant is None else {"lossless", "converted"})


def test_progress_ends_with_all_bytes(tmp_path):
    write_folder(tmp_path / "m")
    seen = []
    report = ptqc.export(
        tmp_path / "m", "gguf", tmp_path / "a.gguf", quant="Q8_0", on_progress=lambda *now: seen.append(now)
    )
    total = sum(tensor.nbytes for tensor in report.tensors)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {whole for _, whole, _ in seen} == {total} and seen[-1][0] == total
    assert {name for _, _, name in seen} == {tensor.name for tensor in report.tensors}


def test_what_cannot_be_read_by_rows_is_loaded(tmp_path):
    model = write_folder(tmp_path / "m")
    ptqc.save(ptqc.quantize(model, "rtn", bits=4, group_size=32, progress=False), tmp_path / "q")
    save_tokenizer(tmp_path / "q")
    report = ptqc.export(tmp_path / "q", "gguf", tmp_path / "a.gguf", quant="Q4_0")
    assert sum(tensor.fate == "lossless" and tensor.stored_as == "Q4_0" for tensor in report.tensors) == 14
    again = ptqc.export(tmp_path / "a.gguf", "gguf", tmp_path / "b.gguf", tokenizer=tmp_path / "m")
    assert {tensor.fate for tensor in again.tensors} == {"lossless"}


PEAK = """
import sys
from pathlib import Path
import ptqc

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

small, large = map(Path, sys.argv[1:])
ptqc.export(small, "gguf", small / "out.gguf", quant="Q8_0")
before = peak()
ptqc.export(large, "gguf", large / "out.gguf", quant="Q8_0")
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the peak memory of a process")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """285 MB of weights, most of them in one tensor: a process that has exported before needs some bands of rows."""
    from benchmarks.stream_memory import write_model

    write_folder(tmp_path / "small")
    write_model(tmp_path / "large", float("inf"), vocabulary=40_000, layers=1)
    save_tokenizer(tmp_path / "large")
    command = [sys.executable, "-W", "ignore", "-c", PEAK, tmp_path / "small", tmp_path / "large"]
    own = {"PYTHONPATH": ".", "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back at once
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 280e6
    assert int(done.stdout) < 120e6


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_disk_without_room_is_said_before_a_byte_is_written(tmp_path, monkeypatch):
    write_folder(tmp_path / "m")
    out = tmp_path / "out"
    out.mkdir()
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("ptqc.scratch.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ExportError, match=r"would take 0.000 GB, but only 0.000 GB are free.*choose another disk"):
        ptqc.export(tmp_path / "m", "gguf", out / "a.gguf", quant="Q8_0")
    assert names(out) == []


KILLED = """
import sys, time
import ptqc
import ptqc.codegen.export._gguf_file as file

encode = file.encode_bands
def slowly(at, *rest):
    print(at.stored_name, flush=True)
    time.sleep(60 if at.stored_name.startswith("blk.1") else 0)
    return encode(at, *rest)
file.encode_bands = slowly
ptqc.export(sys.argv[1], "gguf", sys.argv[2], quant="Q8_0")
"""


def test_a_killed_run_leaves_no_file_and_the_next_one_cleans_up(tmp_path):
    write_folder(tmp_path / "m")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "m"), str(out / "a.gguf")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("blk.1"):
            break
    left = names(out)
    assert len(left) == 1 and left[0].startswith(".a.gguf.ptqc-part-")
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert names(out) == left
    time.sleep(0.1)
    ptqc.export(tmp_path / "m", "gguf", out / "a.gguf", quant="Q8_0")
    assert names(out) == ["a.gguf"]


def test_a_tokenizer_of_another_folder_goes_along(tmp_path):
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ExportError, match=r"no tokenizer could be read"):
        ptqc.export(tmp_path / "m", "gguf", tmp_path / "a.gguf", quant="Q8_0")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ptqc.export(tmp_path / "m", "gguf", tmp_path / "a.gguf", quant="Q8_0", tokenizer=tmp_path).nbytes > 0
