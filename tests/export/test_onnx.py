import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from ptqc import storage
from ptqc.codegen.export._onnx_forms import Blockwise, blockwise, matmul_nbits
from ptqc.codegen.export.onnx import typed_copy
from ptqc.codegen.exporters import export
from ptqc.errors import ExportError
from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings
from tests.export._models import quantized, relative, small_model, stored
from tests.surrounded import extras_for, surroundings

onnxruntime = pytest.importorskip("onnxruntime")


def opened(path):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # 4, the default: int8 inputs
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, **inputs):
    return torch.from_numpy(opened(path).run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def check(model, path, *shapes, has_mask=True):
    """ONNX Runtime and torch agree on random tokens of every shape, the mask hiding some of them."""
    for seed, shape in enumerate(shapes):
        ids = torch.randint(0, 4096, shape, generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask} if has_mask else {"input_ids": ids}
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
        found = run(path, **inputs)
        assert found.shape == expected.shape
        assert relative(found[mask.bool()], expected[mask.bool()]) < 1e-4


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x, y):
        return self.out(torch.relu(self.norm(self.into(x)))) + y


def test_a_plain_module_with_stored_weights_takes_any_batch(tmp_path):
    torch.manual_seed(0)
    model = Plain()
    model.into.weight = nn.Parameter(stored(model.into.weight, "int4g32"), requires_grad=False)
    x, y = torch.randn(5, 32), torch.randn(5, 4)
    report = export(model, "onnx", tmp_path / "m.onnx", example_inputs=(torch.randn(3, 32), torch.randn(3, 4)))
    assert model.training
    assert isinstance(model.into.weight, QuantTensor)
    with torch.no_grad():
        assert torch.allclose(run(tmp_path / "m.onnx", x=x, y=y), model.eval()(x, y), atol=1e-5)
    kinds = {(tensor.stored_as, tensor.fate) for tensor in report.tensors}
    assert kinds == {("MatMulNBits 4", "lossless"), ("float32", "lossless")}
    export(model, "onnx", tmp_path / "named.onnx", example_inputs={"y": y, "x": x})
    assert torch.allclose(run(tmp_path / "named.onnx", x=x[:2], y=y[:2]), model(x, y)[:2].detach(), atol=1e-5)


def test_what_is_not_known_or_not_possible_is_an_error(tmp_path):
    with pytest.raises(ExportError, match=r"how to call a Plain is unknown.*pass example_inputs="):
        export(Plain(), "onnx", tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"no 'int8' weights; dtype may be float32"):
        export(Plain(), "onnx", tmp_path / "m.onnx", dtype="int8")

    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if float(x.sum()) > 0 else x - 1

    with pytest.raises(ExportError, match=r"does not become an ONNX graph: .*\(\w+: .+\)$"):
        export(Branching(), "onnx", tmp_path / "m.onnx", example_inputs=(torch.ones(2, 2),))
    assert list(tmp_path.iterdir()) == []


def test_the_copy_shares_floats_and_parts_and_keeps_ties():
    model = quantized(small_model(tie_word_embeddings=True), "nf4g32").train()
    copy, tensors = typed_copy(model, None)
    projection = "model.layers.0.mlp.up_proj.weight"
    mine, its = model.get_parameter(projection), copy.get_parameter(projection)
    assert its.parts["codes"].data_ptr() == mine.parts["codes"].data_ptr()
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert (copy.training, model.training) == (False, True)
    assert len(tensors) == len(list(model.parameters()))


class Many(nn.Module):
    """Linears of one input, with these weights."""

    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(64, 48, bias=index % 2 == 0) for index in range(len(weights)))
        for linear, weight in zip(self.linears, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return torch.cat([linear(x) for linear in self.linears], -1)


CASES = [
    # spec, surroundings, stored as nbits, stored as standard
    ("int4g32", None, "MatMulNBits 4", "DequantizeLinear 4"),
    ("int4g32z", None, "MatMulNBits 4", "DequantizeLinear 4"),
    ("int4g32m", None, "MatMulNBits 4", "codes 4"),
    ("int3g16", None, "MatMulNBits 4", "DequantizeLinear 4"),
    ("int2g32z", None, "MatMulNBits 2", "DequantizeLinear 2"),
    ("int8", None, "MatMulNBits 8", "DequantizeLinear 8"),
    ("int5g64z", None, "MatMulNBits 8", "DequantizeLinear 8"),
    ("ternaryg32", None, "MatMulNBits 2", "DequantizeLinear 2"),
    ("int4g8", None, "codes 4", "DequantizeLinear 4"),
    ("int3g8m", None, "codes 3", "codes 3"),
    ("int5g8f", None, "codes 5", "codes 5"),
    ("ternaryg8", None, "codes ternary", "DequantizeLinear 2"),
    ("nf4g32dq", None, "MatMulBnb4 nf4", "codes nf4"),
    ("nf4", "scale", "MatMulBnb4 nf4", "codes nf4"),
    ("fp4g16", None, "MatMulBnb4 fp4", "codes fp4"),
    ("nf4g8", None, "codes nf4", "codes nf4"),
    ("iq4_nl", None, "codes iq4nl", "codes iq4nl"),
    ("mxfp4", None, "codes e2m1", "codes e2m1"),
    ("fp8e4m3", None, "codes fp8e4m3", "DequantizeLinear fp8e4m3"),
    ("fp8e5m2g32", None, "codes fp8e5m2", "DequantizeLinear fp8e5m2"),
    ("fp8e4m3t", None, "codes fp8e4m3", "codes fp8e4m3"),
    ("fp8e4m3b16x32", None, "codes fp8e4m3", "codes fp8e4m3"),
    ("fp8e4m3b40x48", None, "float32", "float32"),
    ("e8p", None, "codes e8p", "codes e8p"),
    ("e8pg16", "output rotation", "codes e8p", "codes e8p"),
    ("e8p3", None, "codes e8p3", "codes e8p3"),
    ("e8p4", None, "codes e8p4", "codes e8p4"),
    ("int4g32", "scale", "MatMulNBits 4", "DequantizeLinear 4"),
    ("int4g32", "order", "MatMulNBits 4", "DequantizeLinear 4"),
    ("int4g32", "output rotation", "MatMulNBits 4", "DequantizeLinear 4"),
    ("int8", "everything", "MatMulInteger 8", "MatMulInteger 8"),
    ("int8", "int8", "MatMulInteger 8", "MatMulInteger 8"),
    ("int8", "static", "MatMulInteger 8", "MatMulInteger 8"),
    ("int4g32", "int8", "MatMulNBits 4", "DequantizeLinear 4"),
    ("int8", "outliers", "MatMulNBits 8", "DequantizeLinear 8"),
]


def one_of(spec, kind):
    around = Surroundings() if kind is None else surroundings(kind, (48, 64))
    parsed, extras = WeightSpec.parse(spec), extras_for(around, (48, 64))
    method = METHODS.get("quip_sharp")() if parsed.vector > 1 else METHODS.get("rtn")(symmetric=parsed.is_symmetric)
    return quantize_weight(
        torch.randn(48, 64), method, parsed, statistics={"hessian": torch.eye(64)}, surroundings=around, extras=extras
    )


@pytest.mark.parametrize("quant", ["nbits", "standard", "float"])
def test_every_kind_of_weight_is_what_torch_computes(tmp_path, quant):
    torch.manual_seed(0)
    model = Many([one_of(spec, kind) for spec, kind, _, _ in CASES]).eval()
    report = export(model, "onnx", tmp_path / "m.onnx", quant=quant, example_inputs=(torch.randn(3, 64),))
    kinds = [tensor.stored_as for tensor in report.tensors if tensor.name.endswith("weight")]
    columns = {"nbits": [case[2] for case in CASES], "standard": [case[3] for case in CASES]}
    integer = ["MatMulInteger 8" if case[2] == "MatMulInteger 8" else "float32" for case in CASES]
    assert kinds == columns.get(quant, integer)
    said = " ".join(report.notes)
    assert ("other operators of the graph decode: e8p levels are no affine function" in said) == (quant != "float")
    assert ("decoded to floats: its blocks do not divide its rows and columns" in said) == (quant != "float")
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(x).split(48, -1), run(tmp_path / "m.onnx", x=x).split(48, -1)
    for case, one, other in zip(CASES, found, expected, strict=True):
        assert relative(one, other) < 2e-6, case


def test_packed_weights_take_the_bytes_of_their_codes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False)).eval()
    weight = model[0].weight
    for quant, spec in itertools.product(("nbits", "standard"), ("int4g32", "nf4g64", "fp8e4m3b128x128", "iq4_nl")):
        model[0].weight = nn.Parameter(stored(weight, spec), requires_grad=False)
        report = export(model, "onnx", tmp_path / "m.onnx", quant=quant, example_inputs=(torch.randn(3, 512),))
        (tensor,) = report.tensors
        assert tensor.nbytes == model[0].weight.nbytes
        assert report.nbytes < 1.03 * tensor.nbytes


class Experts(nn.Module):
    """A stack of experts, each with inputs of its own, behind an embedding; all of it stored."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(40, 32)
        self.stack = nn.Parameter(stored(torch.randn(3, 24, 32), "nf4g16"), requires_grad=False)
        self.tokens.weight = nn.Parameter(stored(self.tokens.weight, "int4g16z"), requires_grad=False)

    def forward(self, ids):
        return torch.bmm(self.tokens(ids), self.stack.mT)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_experts_and_embeddings_keep_their_codes(tmp_path, dtype):
    torch.manual_seed(0)
    model, ids = Experts().eval(), torch.randint(0, 40, (3, 5))
    report = export(model, "onnx", tmp_path / "m.onnx", example_inputs=(ids,), dtype=dtype)
    assert {tensor.stored_as for tensor in report.tensors} == {"codes nf4", "codes 4"}
    assert sum(tensor.nbytes for tensor in report.tensors) < 1.2 * sum(w.nbytes for w in model.parameters())
    with torch.no_grad():
        assert (
            relative(run(tmp_path / "m.onnx", ids=ids).float(), model(ids)) < {"float32": 1e-6, "float16": 2e-3}[dtype]
        )


def test_codebooks_in_float16_run_on_cpus(tmp_path):
    torch.manual_seed(0)
    model, x = Many([stored(torch.randn(48, 64), "nf4g32")]).eval(), torch.randn(3, 64)
    report = export(model, "onnx", tmp_path / "m.onnx", example_inputs=(x.half(),), dtype="float16")
    assert report.tensors[0].stored_as == "codes nf4"
    with torch.no_grad():
        assert relative(run(tmp_path / "m.onnx", x=x.half()).float(), model(x)) < 2e-3


def test_a_group_that_is_nothing_but_its_minimum():
    """Its scale is zero, so that no zero point in units of it can stand for the minimum."""
    spec = WeightSpec.parse("int4g32m")
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    scale, minimum = torch.full((3, 2), 0.25), torch.full((3, 2), 0.5)
    scale[1, 0] = 0
    parts = storage.encode(storage.Codes(codes, scale, minimum), spec)
    found = blockwise(parts, spec, (3, 64))
    numbers = (found.codes.float() - found.zero.repeat_interleave(32, 1)) * found.scale.repeat_interleave(32, 1)
    assert torch.equal(numbers, storage.decode(parts, spec, (3, 64), torch.float32))
    assert (numbers[1, :32] == -0.5).all()


def test_words_along_the_inputs():
    """By hand: eight 4-bit codes of a row in blocks of 16, the first in the low bits."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 1)
    weight = Blockwise(codes, torch.ones(2, 1), torch.tensor([[8.0], [3.0]]), 4, 16, True)
    made = matmul_nbits(weight)
    (words, scale, zeros), sizes = made.arrays, made.attributes
    assert words.tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]] * 2
    assert zeros.tolist() == [[8], [3]] and scale.shape == (2, 1)
    assert sizes == {"K": 16, "N": 2, "bits": 4, "block_size": 16}
    assert matmul_nbits(replace(weight, block=8)) == (
        "MatMulNBits has blocks of 16, 32, 64 ...; none of these divides the group 8"
    )


@pytest.mark.parametrize(
    ("asked", "held", "found", "fate"),
    [
        (None, torch.float16, torch.float16, "lossless"),
        (None, torch.bfloat16, torch.float32, "lossless"),
        ("float32", torch.float16, torch.float32, "lossless"),
        ("float16", torch.float32, torch.float16, "converted"),
        ("bfloat16", torch.float16, torch.bfloat16, "converted"),
    ],
)
def test_types_of_weights(asked, held, found, fate):
    copy, tensors = typed_copy(Plain().to(held), asked)
    assert {weight.dtype for weight in copy.parameters()} == {found}
    assert copy.norm.running_mean.dtype == found
    assert {tensor.fate for tensor in tensors} == {fate}


def generated(session, ids, count):
    """Greedy tokens of a session with a cache, and the logits of every step."""
    feed = {entry.name: entry for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]
    sizes = [entry.shape for name, entry in feed.items() if name.startswith("past")]
    past = {
        name: torch.zeros(len(ids), entry.shape[1], 0, entry.shape[3]).numpy()
        for name, entry in feed.items() if name.startswith("past")
    }  # fmt: skip
    assert all(size[0] == "batch" and size[2] == "past" for size in sizes)
    tokens, steps, rest = ids, [], ids
    for _ in range(count):
        mask = torch.ones_like(tokens)
        found = session.run(None, {"input_ids": rest.numpy(), "attention_mask": mask.numpy()} | past)
        made = zip(outputs[1:], found[1:], strict=True)
        past = {name.replace("present", "past_key_values"): value for name, value in made}
        steps.append(torch.from_numpy(found[0][:, -1]))
        rest = steps[-1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, rest], 1)
    return tokens, torch.stack(steps, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "spec"), [("nbits", "int4g32z"), ("standard", "int4g32z"), ("nbits", "nf4g32")])
def test_a_language_model_generates_with_its_cache(tmp_path, quant, spec):
    model = quantized(small_model(tie_word_embeddings=True), spec)
    report = export(model, "onnx", tmp_path / "m.onnx", quant=quant)
    ids = torch.randint(0, 4096, (2, 7), generator=torch.Generator().manual_seed(0))
    tokens, logits = generated(opened(tmp_path / "m.onnx"), ids, 16)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
        exact = model(expected).logits[:, 6:-1]
    assert torch.equal(tokens, expected)
    assert relative(logits, exact) < 1e-5
    floats = sum(weight.nbytes for name, weight in model.named_parameters() if not name.endswith("proj.weight"))
    packed = sum(weight.nbytes for name, weight in model.named_parameters() if name.endswith("proj.weight"))
    assert sum(tensor.nbytes for tensor in report.tensors) <= 1.03 * (packed + floats)


@pytest.mark.slow
def test_onnx_runtime_agrees_on_the_reference_model(tmp_path, reference_model):
    export(reference_model, "onnx", tmp_path / "m.onnx", cache=False)
    check(reference_model, tmp_path / "m.onnx", (1, 5), (3, 17))


@pytest.mark.slow
def test_a_quantized_language_model_with_weights_in_a_second_file(tmp_path):
    model = quantized(small_model(), "int4g32")
    report = export(model, "onnx", tmp_path / "m.onnx", external_data=True, attention_mask=False, cache=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    check(model, tmp_path / "m.onnx", (1, 7), (4, 12), has_mask=False)
