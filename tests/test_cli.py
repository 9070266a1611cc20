import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ptqc.cli import _output, main
from ptqc.cli._options import read_options
from ptqc.errors import PtqcError
from ptqc.folders.artefacts import WorkFolder
from ptqc.folders.checkpoint import load
from ptqc.methods import METHODS
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.qtensor import QuantTensor
from ptqc.transforms import TRANSFORMS

COMMANDS = ("quantize", "plan", "eval", "compare", "inspect", "generate", "export", "methods")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, request):
    """A folder with a Llama of two small layers, and the reference model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    reference = request.config.rootpath / "benchmarks" / "models" / "reference"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference / name, folder)
    return folder


@pytest.fixture(scope="session")
def quantized(tiny):
    """The same model with 4-bit weights."""
    folder = tiny.with_name("int4")
    assert main(["quantize", str(tiny), "--method", "rtn", "--group-size", "32", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command; gives its exit code, stdout and stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)  # set in the workers of pytest-xdist; tables then wrap

    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def run_json(run):
    """Runs a command with --json, which must succeed, and reads its stdout."""

    def call(*words):
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


# -------------------------------------------------------------------- help and mistakes

_HELP = """
import resource, sys
from ptqc.cli import main
for words in (["--help"], *([command, "--help"] for command in {commands!r})):
    assert main(words) == 0
heavy = {{"torch", "transformers", "numpy", "matplotlib"}} & set(sys.modules)
assert not heavy, heavy
usage = resource.getrusage(resource.RUSAGE_SELF)
print("SECONDS", usage.ru_utime + usage.ru_stime, file=sys.stderr)
"""


def test_help_is_quick_and_imports_nothing_heavy():
    program = _HELP.format(commands=COMMANDS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.split("SECONDS")[1]) < 1  # of processor time: other processes do not count
    assert "--group-size" in done.stdout


def test_no_words_ask_for_help(run):
    code, out, _ = run()
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["eval"], "Missing argument 'MODEL'"),
        (["eval", "m", "--window", "x"], "Invalid value for '--window'"),
        (["quantize", "m", "--out", "o"], "give either --method or --recipe"),
        (["quantize", "m", "--out", "o", "--recipe", "r", "--bits", "4"], "drop --bits"),
        (["quantize", "m", "--out", "o", "--method", "bogus"], "no method is called 'bogus'"),
        (["quantize", "m", "--out", "o", "--method", "rtn", "--bits", "9"], "no integer spec has 9"),
        (["quantize", "m", "--out", "o", "--method", "rtn", "--spec", "int4x"], "'int4x' is no weight spec"),
        (["quantize", "m", "--out", "o", "--method", "rtn", "--option", "x"], "'x' is not of the form name=value"),
        (["quantize", "m", "--out", "o", "--method", "rtn", "--option", "x=1"], "has no option x"),
        (["quantize", "m", "--out", "o", "--method", "gptq", "--option", "damp=four"], "damp must be a number"),
        (["quantize", "m", "--out", "o", "--method", "awq", "--option", "rows=1.5"], "rows must be a whole number"),
        (["quantize", "m", "--out", "o", "--method", "rtn"], "m does not exist"),
        (["inspect", "no/such"], "no/such is no folder here"),
        (["generate", "m", "--prompt", "x"], "m does not exist"),
        (["compare", "m", "--out", "o", "--methods", "rtn:4:x"], "is no candidate"),
        (["compare", "m", "--out", "o", "--methods", "rtn,awq:3,gptq"], "awq:3, gptq needs calibration data; add"),
        (["export", "m", "bogus", "--out", "o"], "no format is called 'bogus'"),
    ],
)
def test_mistakes_are_one_line_and_code_2(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[-1].startswith("ptqc: ")
    assert message in lines[-1]
    assert sum(line.startswith("ptqc: ") for line in lines) == 1
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_a_model(run, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "there.gguf").write_text("")
    for words, message in (
        (["eval", tiny, "--text", tmp_path / "none.txt"], "neither a file nor one of the embedded texts"),
        (["eval", tiny, "--text", tmp_path / "short.txt"], "a window takes 512"),
        (["eval", tiny, "--window", "64", "--windows", "1", "--device", "nowhere"], "no device 'nowhere' here"),
        (["eval", tiny, "--window", "64", "--windows", "1", "--dtype", "int3"], "no dtype is called 'int3'"),
        (["export", tiny, "gguf", "--out", tmp_path / "there.gguf"], "there.gguf exists; add --overwrite"),
        (["compare", tiny, "--methods", "rtn", "--out", tmp_path / "short.txt"], "is a file"),
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]


def test_a_config_that_transformers_cannot_use_is_named(run, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": "many"}))
    for words in (
        ["eval", folder, "--window", "64", "--windows", "1"],
        ["quantize", folder, "--method", "rtn", "--out", tmp_path / "out"],
    ):
        code, _, err = run(*words)
        assert code == 2
        assert str(folder) in err.splitlines()[-1]


def test_a_model_without_tokenizer_is_named(run, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    code, _, err = run("eval", folder, "--window", "64", "--windows", "1")
    assert code == 2
    assert f"{folder} has no tokenizer that transformers can load" in err.splitlines()[-1]


def test_damaged_weights_are_named(run, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    for words in (
        ["inspect", folder],
        ["eval", folder, "--window", "64", "--windows", "1"],
        ["quantize", folder, "--method", "rtn", "--out", tmp_path / "out"],
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert "model.safetensors is damaged: it is 100 bytes short" in err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_verbose_adds_the_traceback(run):
    code, _, err = run("--verbose", "inspect", "missing")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("ptqc: missing does not exist")


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("ptqc 0.")


@pytest.mark.parametrize(("words", "left"), [([], []), (["--calibration", "docs"], [".out.ptqc-work"])])
def test_an_interrupt_is_130_and_leaves_no_output(run, tiny, tmp_path, monkeypatch, words, left):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ptqc.folders.shards.TensorWriter.append", interrupt)
    code, out, err = run("quantize", tiny, "--method", "rtn", "--out", tmp_path / "out", *words)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "ptqc: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == left  # finished pieces of a calibrated run are kept


# -------------------------------------------------------------------- quantize


def test_quantize_writes_a_folder_and_says_what_it_holds(run_json, tiny, tmp_path):
    document = run_json(
        "quantize", tiny, "--method", "rtn", "--bits", 4, "--group-size", 32, "--exclude", "down_proj", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert document["weights"] == 12
    assert document["formats"] == {"int4g32": 12}
    assert document["bits_per_weight"] == 4.5
    assert document["in_float"]["excluded"] == 2
    assert document["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    model = load(tmp_path / "out")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QuantTensor)
    assert not isinstance(model.model.layers[0].mlp.down_proj.weight, QuantTensor)


def test_quantize_shows_a_summary(run, tiny, tmp_path):
    words = ("--method", "rtn", "--spec", "int8", "--include", "mlp", "--out", tmp_path / "out")
    code, out, err = run("quantize", tiny, *words)
    assert code == 0
    assert err.startswith("plan: 6 weights (6 x rtn int8), ")
    assert "6 weights quantized (6 x int8)" in out
    assert "MB in" in out


def test_quantize_follows_a_recipe(run_json, tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    first, second = "{pattern: mlp, method: rtn, bits: 3, group_size: 32}", "{pattern: '*', method: rtn, spec: int8}"
    recipe.write_text(f"- {first}\n- {second}\n")
    document = run_json("quantize", tiny, "--recipe", recipe, "--out", tmp_path / "out")
    assert document["formats"] == {"int8": 8, "int3g32": 6}


def test_options_reach_the_method(run_json, tiny, tmp_path):
    words = ("--method", "rtn", "--group-size", 32, "--option", "symmetric=false", "--out", tmp_path / "out")
    assert run_json("quantize", tiny, *words)["formats"] == {"int4g32z": 14}


def test_a_folder_is_only_replaced_when_asked(run, tiny, tmp_path):
    words = ("quantize", tiny, "--method", "rtn", "--out", tmp_path / "out")
    assert run(*words)[0] == 0
    code, _, err = run(*words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert run(*words, "--overwrite")[0] == 0


def test_calibration_data_takes_the_model_into_memory(run_json, tiny, quantized, tmp_path):
    document = run_json(
        "quantize", tiny, "--method", "rtn", "--group-size", 32, "--calibration", "docs", "--out", tmp_path / "out"
    )
    assert document["weights"] == 14
    theirs, ours = load(quantized).state_dict(), load(tmp_path / "out").state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_run_that_died_at_its_very_end_is_finished_by_the_same_command(run, tiny, tmp_path, monkeypatch):
    class Died(BaseException):
        """Stands for a kill."""

    def die(self):
        raise Died

    words = ("--method", "rtn", "--calibration", "docs", "--samples", 2, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", die)
        with pytest.raises(Died):
            run("quantize", tiny, *words)
    assert len(list(tmp_path.iterdir())) == 2
    code, out, err = run("quantize", tiny, *words)
    assert code == 0 and "14 weights quantized" in out and "is complete already; removed" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    code, _, err = run("quantize", tiny, *words)
    assert code == 2 and "exists and is not empty" in err


def test_a_method_that_needs_data_says_so(run, tiny, tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Needy(RoundToNearest):
        """Rounds, but wants to see data."""

        needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    monkeypatch.setitem(METHODS._entries, "needy", Needy)
    code, _, err = run("quantize", tiny, "--method", "needy", "--out", tmp_path / "out")
    assert code == 2
    assert "needy needs calibration data; add --calibration" in err


def test_auto_needs_data_and_says_so(run, tiny, tmp_path):
    code, _, err = run("quantize", tiny, "--method", "auto", "--bits", "3.5", "--out", tmp_path / "out")
    assert (code, "auto needs calibration data; add --calibration" in err) == (2, True)


@pytest.mark.slow
def test_auto_spends_its_bits(run_json, tiny, tmp_path):
    words = (
        "--method",
        "auto",
        "--bits",
        "4.75",
        "--group-size",
        "32",
        "--option",
        "base=rtn",
        "--calibration",
        "docs",
    )
    document = run_json("quantize", tiny, *words, "--out", tmp_path / "out")
    assert 4 < document["bits_per_weight"] <= 4.75
    assert len(document["formats"]) > 1


@pytest.mark.slow
def test_transforms_and_methods_by_name(run_json, tiny, tmp_path):
    words = ("--method", "smoothquant+gptq", "--calibration", "docs", "--samples", "4", "--window", "64")
    document = run_json("quantize", tiny, *words, "--group-size", "32", "--out", tmp_path / "out")
    assert document["formats"] == {"int4g32": 14}


# -------------------------------------------------------------------- plan


def test_plan_lists_weights_groups_and_reasons(run, run_json, tiny):
    words = ("plan", tiny, "--method", "rtn", "--group-size", 32)
    document = run_json(*words)
    assert (len(document["weights"]), document["bits_per_weight"]) == (14, 4.5)
    assert {group["kind"] for group in document["groups"]} >= {"fold"}
    code, out, _ = run(*words, "--all")
    assert code == 0
    assert "model.layers.1.mlp.up_proj.weight" in out
    assert "an embedding" in out


def test_a_plan_that_touches_nothing_fails_with_the_reasons(run, tiny):
    code, out, err = run("plan", tiny, "--method", "rtn", "--exclude", "*")
    assert code == 2
    assert "plan: 0 weights" in out
    assert "ptqc: nothing would be quantized (14 x excluded" in err


# -------------------------------------------------------------------- the other commands


def test_inspect_lists_sites_and_totals(run, run_json, quantized, monkeypatch):
    monkeypatch.setattr("ptqc.folders.safefile.TensorEntry.pieces", None)  # headers only: no tensor may be read
    document = run_json("inspect", quantized)
    rows = {row["name"]: row for row in document["tensors"]}
    up = rows["model.layers.0.mlp.up_proj.weight"]
    assert (up["format"], up["shape"], up["nbytes"], up["bits_per_weight"]) == ("int4g32", [128, 64], 4608, 4.5)
    assert rows["lm_head.weight"]["format"] == "float16"
    assert document["quantized_by"] == "ptqc"
    assert document["totals"]["quantized"]["weights"] == 14
    assert document["totals"]["all"]["bytes"] == sum(row["nbytes"] for row in rows.values())
    code, out, _ = run("inspect", quantized)
    assert code == 0
    assert "128 x 64" in out
    assert "norm" not in out
    assert "norm" in run("inspect", quantized, "--all")[1]


def test_inspect_orders_layers_by_number(run_json, tiny):
    names = [row["name"] for row in run_json("inspect", tiny / "model.safetensors")["tensors"]]
    assert names.index("model.layers.0.mlp.up_proj.weight") < names.index("model.layers.1.mlp.down_proj.weight")
    assert len(names) == 21


def test_names_from_files_cannot_steer_the_terminal(run, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"[/red]\x1b[31m\rname": torch.zeros(4, 4)}, file)
    code, out, _ = run("inspect", file)
    assert code == 0
    assert "[/red]?[31m?name" in out
    assert "\x1b" not in out
    code, _, err = run("inspect", tmp_path / "\x1b[31m.safetensors")
    assert (code, "\x1b" in err) == (2, False)


def test_inspect_names_a_foreign_quantizer(run, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    code, out, _ = run("inspect", folder)
    assert code == 0
    assert "quantized by gptq" in out


def test_eval_against_the_float_model(run, run_json, tiny, quantized):
    words = ("eval", quantized, "--window", 64, "--windows", 2)
    document = run_json(*words, "--against", tiny)
    assert (document["windows"], document["tokens"]) == (2, 126)
    assert 0 < document["kl"] < 0.1
    assert 0.5 < document["top1"] <= 1
    code, out, _ = run(*words, "--text", "code")
    assert code == 0
    assert "2 windows of 64" in out


def test_eval_of_a_file(run_json, tiny, tmp_path):
    file = tmp_path / "text.jsonl"
    line = json.dumps({"body": "the quick brown fox jumps over the lazy dog " * 9})
    file.write_text("\n".join([line] * 4))
    document = run_json("eval", tiny, "--text", file, "--column", "body", "--window", 32, "--windows", 0)
    assert document["text"] == "text.jsonl"
    assert document["windows"] > 10


def test_generate_streams_text(run, run_json, quantized):
    words = ("generate", quantized, "--prompt", "The for statement", "--max-new-tokens", 5)
    document = run_json(*words)
    assert 1 <= document["tokens"] <= 5
    code, out, err = run(*words)
    assert code == 0
    assert out.strip() == f"The for statement{document['text']}".strip()
    assert "per second" in err


def test_generate_samples_with_a_seed(run_json, quantized):
    words = ("generate", quantized, "--prompt", "The", "--max-new-tokens", 8, "--temperature", 1.5)
    assert run_json(*words, "--seed", 1)["text"] == run_json(*words, "--seed", 1)["text"]
    assert run_json(*words, "--seed", 1)["text"] != run_json(*words, "--seed", 2)["text"]


def test_methods_lists_every_method(run, run_json):
    rows = {row["name"]: row for row in run_json("methods")}
    assert list(rows) == METHODS.names() + TRANSFORMS.names()
    assert rows["rtn"] == {
        "name": "rtn", "kind": "method", "what": "Round to nearest", "stands_for": "rtn", "spec": "int4g64",
        "activation": "float", "bits_per_weight": 4.25, "needs": [], "options": {"symmetric": True},
    }  # fmt: skip
    assert (rows["awq"]["kind"], rows["awq"]["stands_for"], rows["awq"]["spec"]) == (
        "transform",
        "awq+rtn",
        "int4g128z",
    )
    assert "symmetric=True" in run("methods")[1]


def test_compare_writes_its_files(run_json, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    words = ("--methods", "rtn:4:32,rtn:2:32", "--window", 64, "--windows", 2, "--out", tmp_path / "out")
    document = run_json("compare", tiny, *words)
    assert [row["spec"] for row in document["runs"]] == ["int4g32", "int2g32"]
    assert document["runs"][0]["kl"] < document["runs"][1]["kl"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000


def test_export_writes_a_file(run, run_json, quantized, tmp_path):
    pytest.importorskip("gguf")
    out = tmp_path / "model.gguf"
    document = run_json("export", quantized, "gguf", "--quant", "F16", "--out", out)
    assert (document["path"], document["format"], document["nbytes"]) == (str(out), "gguf", out.stat().st_size)
    code, text, _ = run("export", quantized, "gguf", "--quant", "Q8_0", "--out", out, "--overwrite")
    assert code == 0
    assert "model.gguf" in text


def test_export_writes_a_folder_without_loading_the_model(run, run_json, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr("ptqc.folders.checkpoint.load", None)
    monkeypatch.setattr("ptqc.exports.load", None)
    out = tmp_path / "gptq"
    document = run_json("export", quantized, "gptq", "--out", out)
    assert (document["path"], document["format"]) == (str(out), "gptq")
    assert {tensor["fate"] for tensor in document["tensors"]} == {"lossless"}
    assert (out / "tokenizer.json").exists()
    code, _, err = run("export", quantized, "awq", "--out", out)
    assert (code, err.splitlines()[-1].endswith("ask for overwrite")) == (2, True)
    code, text, _ = run("export", out, "compressed-tensors", "--option", "g_idx=true", "--out", out, "--overwrite")
    assert code == 0
    assert "int4g32 lossless" in text
    monkeypatch.undo()
    code, text, err = run("generate", out, "--prompt", "def main(", "--max-new-tokens", "2")
    assert code == 0, err


# -------------------------------------------------------------------- rendering


def test_progress_without_a_terminal_is_lines(capsys, monkeypatch):
    monkeypatch.setattr(_output, "_SECONDS_BETWEEN_LINES", 0)
    with _output.progress("quantizing", "bytes") as advance:
        advance(25e6, 100e6, "layers.0")
    with _output.progress("evaluating", "windows") as advance:
        advance(3, 12)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("quantizing layers.0: 25 of 100 MB, ")
    assert second.startswith("evaluating: 3 of 12 windows, ")
    assert first.endswith("s left")


@pytest.mark.parametrize(
    ("text", "value"), [("20", 20), ("0.7", 0.7), ("False", False), ("none", None), ("f32", "f32"), ("[1]", [1])]
)
def test_option_values(text, value):
    assert read_options([f"name={text}"]) == {"name": value}


def test_options_need_a_name():
    assert isinstance(read_options(None), Mapping)
    with pytest.raises(PtqcError, match="name=value"):
        read_options(["=3"])
