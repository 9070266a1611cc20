"""What all dialects promise: the same numbers back, or a reason before anything is written."""

import json

import pytest
import torch
from torch import nn

import ptqc
from ptqc.act_spec import ActSpec
from ptqc.codegen.dialect import DIALECTS
from ptqc.errors import CheckpointError, ExportError, PtqcError, UnknownNameError
from ptqc.folders.staging import staged
from ptqc.surroundings import Surroundings
from tests.export._folders import (
    UP,
    act_order,
    config_in,
    exported,
    ordered,
    quantized,
    rounded,
    tensors_in,
    with_experts,
)
from tests.surrounded import surrounded
from tests.tiny import logits, tiny

HELD = [
    ("gptq", "int4g32"), ("gptq", "int4g32z"), ("gptq", "int3g32"), ("gptq", "int2g32z"), ("gptq", "int8"),
    ("awq", "int4g32z"), ("awq", "int4g32"), ("awq", "int4z"),
    ("compressed-tensors", "int4g32"), ("compressed-tensors", "int3g32z"), ("compressed-tensors", "int8"),
    ("compressed-tensors", "int5g32-f32"), ("compressed-tensors", "fp8e4m3"), ("compressed-tensors", "fp8e4m3t"),
    ("compressed-tensors", "fp8e4m3g32"), ("compressed-tensors", "fp8e4m3b128x128"), ("compressed-tensors", "mxfp4"),
    ("bitsandbytes", "nf4g64"), ("bitsandbytes", "nf4g32dq"), ("bitsandbytes", "fp4g32"),
    ("hqq", "int4g32f"), ("hqq", "int3g32f"), ("hqq", "int2g32z"), ("hqq", "int8g64"), ("hqq", "int1g32f"),
]  # fmt: skip
INT8, STATIC = ActSpec(dtype="int8"), ActSpec(dtype="int8", scale="tensor", is_static=True)


def scale(_):
    return torch.tensor(0.05)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("format", "spec"), HELD)
def test_what_fits_comes_back_as_it_was(tmp_path, format, spec):
    model = quantized(spec)
    report = ptqc.export(model, format, tmp_path / "out")
    assert {tensor.fate for tensor in report.tensors} == {"lossless"}
    assert report.nbytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    found = ptqc.load(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)
    assert sum(isinstance(weight, ptqc.QuantTensor) for weight in found.parameters()) == 14


@pytest.mark.parametrize(
    ("format", "model"),
    [
        ("gptq", lambda: ordered("int4g32")),
        ("gptq", lambda: ordered("int3g32z")),
        ("gptq", lambda: ordered("int4")),
        ("awq", lambda: ordered("int4z")),
        ("hqq", lambda: ordered("int4f")),
        ("compressed-tensors", lambda: ordered("int4z")),
        ("compressed-tensors", lambda: quantized("int8", Surroundings(act=INT8))),
        ("compressed-tensors", lambda: quantized("int8", Surroundings(act=STATIC), act_scale=scale)),
        ("compressed-tensors", lambda: quantized("fp8e4m3", Surroundings(act=ActSpec(dtype="fp8e4m3")))),
        ("bitsandbytes", lambda: quantized("int8", Surroundings(act=ActSpec(dtype="int8", outlier=6.0)))),
    ],
)  # fmt: skip
def test_what_is_around_a_weight_comes_back(tmp_path, format, model):
    made = model()
    ptqc.export(made, format, tmp_path / "out")
    # The order of the inputs of sums may be another one.
    torch.testing.assert_close(logits(ptqc.load(tmp_path / "out")), logits(made), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "hqq"])
@pytest.mark.parametrize("kind", ["scale", "input rotation", "output rotation", "everything"])
def test_what_no_tensor_can_say_is_refused(tmp_path, format, kind):
    spec = "nf4g32" if format == "bitsandbytes" else "int4g32z"
    model = nn.ModuleDict({"up": nn.Linear(64, 64, bias=False)})
    model["up"].weight = nn.Parameter(surrounded(kind, (64, 64), spec)[1], requires_grad=False)
    with pytest.raises(ExportError, match=rf'cannot hold this model: "up.weight": .*; nearest is (int8g32 |{spec})'):
        ptqc.export(model, format, tmp_path / "out")
    assert names(tmp_path) == []
    # ... and stored anew on request: from the numbers that all of it stands for.
    report = ptqc.export(model, format, tmp_path / "out", quant="nearest")
    assert [tensor.fate for tensor in report.tensors] == ["requantized"]
    assert "decoded, and rounded anew to" in str(report)
    found = ptqc.load(tmp_path / "out", model=nn.ModuleDict({"up": nn.Linear(64, 64, bias=False)}))
    expected = model["up"].weight.dequantize()
    error = (found["up"].weight.dequantize() - expected).norm() / expected.norm()
    assert 0 < error < 0.12


@pytest.mark.parametrize(
    ("format", "spec", "nearest"),
    [
        ("gptq", "nf4g32", "int4g32"),
        ("gptq", "int5g32z", "int4g32z"),
        ("gptq", "int4g32f", "int4g32z"),
        ("gptq", "int4g32-f32", "int4g32"),
        ("awq", "int3g32", "int4g32z"),
        ("compressed-tensors", "int4g32f", "int4g32z"),
        ("compressed-tensors", "fp8e5m2", "fp8e4m3"),
        ("compressed-tensors", "e8p", "int2"),
        ("bitsandbytes", "int4g32", "nf4g32"),
        ("bitsandbytes", "int8", "int8 with inputs in int8-token-outlier6"),
        ("hqq", "int5g32f", "int4g32z"),
        ("hqq", "q4_K", "int4g32z"),
    ],
)
def test_the_nearest_spec_is_named(tmp_path, format, spec, nearest):
    method = "quip_sharp" if spec == "e8p" else "rtn"
    model = nn.ModuleDict({"up": nn.Linear(256, 64, bias=False)})
    if method == "rtn":
        model["up"].weight = rounded(model["up"].weight, spec)
    else:
        from ptqc.methods import METHODS, quantize_weight
        from ptqc.spec import WeightSpec

        hessian = {"hessian": torch.eye(256)}
        made = quantize_weight(model["up"].weight, METHODS.get(method)(), WeightSpec.parse(spec), statistics=hessian)
        model["up"].weight = nn.Parameter(made, requires_grad=False)
    with pytest.raises(ExportError, match=rf"nearest is {nearest} \(quant=\"nearest\" stores it so\)"):
        ptqc.export(model, format, tmp_path / "out")
    report = ptqc.export(model, format, tmp_path / "out", quant="nearest")
    assert [tensor.stored_as for tensor in report.tensors] == [nearest.split()[0]]


@pytest.mark.parametrize("format", [name.replace("_", "-") for name in DIALECTS.names()])
def test_a_float_model_needs_a_spec(tmp_path, format):
    with pytest.raises(ExportError, match=r'no weight is quantized; .* quant="(\w+)"') as error:
        ptqc.export(tiny("plain"), format, tmp_path / "out")
    assert names(tmp_path) == []
    quant = str(error.value).split('"')[1]
    report = ptqc.export(tiny("plain"), format, tmp_path / "out", quant=quant)
    assert [tensor.fate for tensor in report.tensors].count("converted") == 14
    assert "weights in float32: rounded to" in str(report)
    assert sum(isinstance(weight, ptqc.QuantTensor) for weight in ptqc.load(tmp_path / "out").parameters()) == 14


def test_a_float_model_is_rounded_as_rtn_would(tmp_path):
    tensors = exported(tiny("plain"), "gptq", tmp_path / "float", quant="int4g32")
    expected = exported(quantized("int4g32"), "gptq", tmp_path / "rounded")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_weights_that_are_no_matrices_of_linears_are_refused(tmp_path):
    model = tiny("transposed")
    ptqc.quantize(model, "rtn", bits=4, group_size=32, progress=False)
    for format in ("compressed-tensors", "hqq"):
        with pytest.raises(ExportError, match=r"the weight of a Conv1D; .* \(those of gptq, awq and bitsandbytes"):
            ptqc.export(model, format, tmp_path / "out", quant="nearest")
        with pytest.raises(ExportError, match=r"the weight of a Conv1D"):
            ptqc.export(tiny("transposed"), format, tmp_path / "out", quant="int4g32")
    plain = nn.ParameterDict({"matrix": rounded(torch.randn(64, 64), "int4g32")})
    with pytest.raises(ExportError, match=r"no weight of a module"):
        ptqc.export(plain, "gptq", tmp_path / "out", quant="nearest")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("format", "spec"), [("gptq", "int4g32z"), ("awq", "int4g32"), ("bitsandbytes", "nf4g32")])
def test_weights_of_a_conv1d_are_stored_as_those_of_linears(tmp_path, format, spec):
    """From a model, anew, from floats, from a folder of ours and from one of theirs; read with and without a model."""
    model, name = tiny("transposed"), "transformer.h.0.mlp.c_fc.weight"
    ptqc.quantize(model, "nf4" if format == "bitsandbytes" else "rtn", spec=spec, progress=False)
    tensors = exported(model, format, tmp_path / "out")
    alone = nn.ModuleDict({"up": nn.Linear(64, 256, bias=False)})
    weight = model.get_parameter(name)
    alone["up"].weight = nn.Parameter(weight.data.t(), requires_grad=False)
    for stored, value in exported(alone, format, tmp_path / "alone").items():
        assert torch.equal(tensors[name.removesuffix("weight") + stored.removeprefix("up.")], value), stored
    ptqc.save(model, tmp_path / "ours")
    sources = {"ours": tmp_path / "ours", "theirs": tmp_path / "out", "loaded": ptqc.load(tmp_path / "out")}
    for source, given in sources.items():
        again = exported(given, format, tmp_path / f"again-{source}")
        assert again.keys() == tensors.keys() and all(torch.equal(again[one], tensors[one]) for one in tensors)
    given = exported(tiny("transposed"), format, tmp_path / "float", quant=spec)
    assert given.keys() == tensors.keys()
    report = ptqc.export(model, format, tmp_path / "near", quant="nearest")
    assert report.notes == (() if format == "bitsandbytes" else (
        "8 weights of a Conv1D: GPTQModel.load opens them, transformers 5.23 does not",))  # fmt: skip
    assert all(torch.equal(value, tensors[one]) for one, value in tensors_in(tmp_path / "near").items())
    for opened in (ptqc.load(tmp_path / "out"), ptqc.load(tmp_path / "out", model=tiny("transposed"))):
        found = opened.get_parameter(name)
        assert found.is_transposed and torch.equal(found.dequantize(), weight.dequantize())
        assert torch.equal(logits(opened), logits(model))


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors", "awq", "hqq"])
def test_packed_experts_are_cut_into_matrices_and_packed_again(tmp_path, format):
    model = with_experts("int4g32z")
    tensors = exported(model, format, tmp_path / "out")
    expert = "model.layers.0.block_sparse_moe.experts.3"
    for name in ("w1", "w2", "w3"):
        assert any(tensor.startswith(f"{expert}.{name}.") for tensor in tensors)
    found = ptqc.load(tmp_path / "out")
    weight = found.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(weight, ptqc.QuantTensor) and weight.shape == (4, 256, 64)
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)
    # From a folder of ours, whose names are the model's, to the same tensors.
    ptqc.save(model, tmp_path / "ours")
    streamed = exported(tmp_path / "ours", format, tmp_path / "streamed")
    assert streamed.keys() == tensors.keys()
    assert all(torch.equal(streamed[name], tensors[name]) for name in tensors)


def test_embeddings_stay_in_float(tmp_path):
    model = quantized("int4g32")
    model.model.embed_tokens.weight = rounded(model.model.embed_tokens.weight, "int4g32")
    with pytest.raises(ExportError, match=r"embed_tokens.weight\": it is an embedding"):
        ptqc.export(model, "gptq", tmp_path / "out", quant="nearest")


# -------------------------------------------------------------------- packs


def test_weights_that_engines_merge_must_agree(tmp_path):
    model = quantized("int4g32")
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight = rounded(tiny("plain").model.layers[1].self_attn.k_proj.weight, "int8g32")
    with pytest.raises(ExportError, match=r"layers.1.self_attn: q_proj is in int4g32, k_proj in int8g32"):
        ptqc.export(model, "compressed-tensors", tmp_path / "out")
    assert names(tmp_path) == []
    ptqc.export(model, "compressed-tensors", tmp_path / "out", is_fused=False)
    torch.testing.assert_close(logits(ptqc.load(tmp_path / "out")), logits(model), rtol=0, atol=0)


def test_float_and_quantized_weights_do_not_merge(tmp_path):
    model = quantized("int4g32")
    model.model.layers[0].mlp.up_proj.weight = tiny("plain").model.layers[0].mlp.up_proj.weight
    with pytest.raises(ExportError, match=r"gate_proj is in int4g32, up_proj in floating point"):
        ptqc.export(model, "gptq", tmp_path / "out")


def test_orders_of_merged_weights_must_agree(tmp_path):
    model = ordered("int4g32")
    ptqc.export(model, "gptq", tmp_path / "alike")
    weight = tiny("plain").model.layers[0].mlp.up_proj.weight
    other = act_order(64).flip(0).contiguous()
    model.model.layers[0].mlp.up_proj.weight = rounded(weight, "int4g32", Surroundings(order=True), order=other)
    with pytest.raises(ExportError, match=r"gate_proj is in int4g32 in an order of its own, up_proj in"):
        ptqc.export(model, "gptq", tmp_path / "out")


# -------------------------------------------------------------------- folders


def test_tied_weights_are_stored_once_and_shards_are_cut(tmp_path):
    model = quantized("int4g32", name="tied")
    tensors = exported(model, "compressed-tensors", tmp_path / "out", max_shard_bytes=30_000)
    assert "lm_head.weight" not in tensors
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert config_in(tmp_path / "out")["ignore"] == ["lm_head"]
    found = ptqc.load(tmp_path / "out")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=0)


def test_generation_defaults_and_tokenizer_go_along(tmp_path):
    model = quantized("int4g32")
    model.generation_config.temperature = 0.25
    ptqc.save(model, tmp_path / "ours")
    (tmp_path / "ours" / "tokenizer_config.json").write_text("{}")
    ptqc.export(tmp_path / "ours", "gptq", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert ptqc.load(tmp_path / "out").generation_config.temperature == 0.25


def test_older_readers_find_their_names(tmp_path):
    ptqc.export(quantized("int4g32"), "gptq", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("spec", ["int4g32", "int4g32z"])
def test_a_folder_is_exported_as_the_model_in_memory(tmp_path, spec):
    model = quantized(spec, name="tied")
    ptqc.save(model, tmp_path / "ours")
    expected = exported(model, "gptq", tmp_path / "memory")
    seen = []
    options = {"on_progress": lambda done, total, name: seen.append(done / total)}
    found = exported(tmp_path / "ours", "gptq", tmp_path / "streamed", **options)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert config_in(tmp_path / "memory") == config_in(tmp_path / "streamed")
    assert seen == sorted(seen) and seen[-1] == 1


def test_one_dialect_becomes_another(tmp_path):
    model = ordered("int4")
    ptqc.export(model, "gptq", tmp_path / "gptq")
    report = ptqc.export(tmp_path / "gptq", "compressed-tensors", tmp_path / "ct")
    assert {tensor.fate for tensor in report.tensors} == {"lossless"}
    found = logits(ptqc.load(tmp_path / "ct"))
    torch.testing.assert_close(found, logits(ptqc.load(tmp_path / "gptq")), rtol=0, atol=0)


def test_a_float_folder_is_rounded_while_it_is_written(tmp_path, source):
    ptqc.export(source, "awq", tmp_path / "out", quant="int4g32z")
    assert config_in(tmp_path / "out")["modules_to_not_convert"] == ["lm_head"]
    assert tensors_in(tmp_path / "out")[f"{UP}.qweight"].shape == (64, 16)


@pytest.fixture
def source(tmp_path):
    tiny("plain", torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fails(self, weight, entries):
        raise CheckpointError("the disk ate it")

    ptqc.export(quantized("int4g32"), "gptq", tmp_path / "out")
    before = names(tmp_path / "out"), tensors_in(tmp_path / "out")
    monkeypatch.setattr(DIALECTS.get("gptq"), "read", fails)
    with pytest.raises(CheckpointError, match="the disk ate it"):
        ptqc.export(quantized("int8g32"), "gptq", tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == before[0]
    assert all(torch.equal(before[1][name], value) for name, value in tensors_in(tmp_path / "out").items())


def test_what_reads_back_as_something_else_is_no_export(tmp_path, monkeypatch):
    dialect = DIALECTS.get("awq")
    write = dialect.write

    def wrong(self, weight):
        tails = write(self, weight)
        return tails if weight.device.type == "meta" else tails | {"scales": tails["scales"] * 2}

    monkeypatch.setattr(dialect, "write", wrong)
    with pytest.raises(ExportError, match="reads back as something else"):
        ptqc.export(quantized("int4g32z"), "awq", tmp_path / "out")
    assert names(tmp_path) == []


def test_targets_are_kept_unless_overwritten(tmp_path):
    with staged(tmp_path / "out") as staging:
        (staging / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        ptqc.export(quantized("int4g32"), "gptq", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no model; only a plain model folder"):
        ptqc.export(quantized("int4g32"), "gptq", tmp_path / "out", overwrite=True)


def test_unknown_names_and_options(tmp_path):
    with pytest.raises(UnknownNameError, match=r"known: awq, bitsandbytes, compressed-tensors, gguf, gptq, hqq, onnx"):
        ptqc.export(tiny("plain"), "ggml", tmp_path / "out")
    with pytest.raises(ExportError, match=r"no option 'colour'; its options: version, is_fused"):
        ptqc.export(tiny("plain"), "gptq", tmp_path / "out", colour="red")
    with pytest.raises(PtqcError, match=r'version must be "gptq", "gptq_v2" or none; got .v3.'):
        ptqc.export(tiny("plain"), "gptq", tmp_path / "out", version="v3")
    with pytest.raises(PtqcError, match=r"is no weight spec"):
        ptqc.export(tiny("plain"), "gptq", tmp_path / "out", quant="Q4_0")


@pytest.mark.parametrize(
    ("format", "first", "second"), [("awq", "int4g32z", "int4g64z"), ("bitsandbytes", "nf4g32", "fp4g32")]
)
def test_formats_with_one_description_for_all_say_so(tmp_path, format, first, second):
    model = quantized(first)
    down = tiny("plain").model.layers[1].mlp.down_proj.weight
    model.model.layers[1].mlp.down_proj.weight = rounded(down, second)
    with pytest.raises(ExportError, match=r"this format has one .* for all weights"):
        ptqc.export(model, format, tmp_path / "out")
    assert names(tmp_path) == []
