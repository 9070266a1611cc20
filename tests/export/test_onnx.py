import pytest
import torch
from torch import nn

from ptqc.codegen.export.onnx import decoded_copy
from ptqc.codegen.exporters import export
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor
from tests.export._models import quantized, relative, small_model, stored

onnxruntime = pytest.importorskip("onnxruntime")


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


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
    assert {(tensor.stored_as, tensor.fate) for tensor in report.tensors} == {("float32", "lossless")}
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

    with pytest.raises(ExportError, match=r"does not become an ONNX graph"):
        export(Branching(), "onnx", tmp_path / "m.onnx", example_inputs=(torch.ones(2, 2),))
    assert list(tmp_path.iterdir()) == []


def test_the_copy_shares_floats_keeps_ties_and_decodes_the_rest():
    model = quantized(small_model(tie_word_embeddings=True), "nf4g32").train()
    copy, tensors = decoded_copy(model, None)
    projection = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(copy.get_parameter(projection), model.get_parameter(projection).dequantize())
    assert isinstance(model.get_parameter(projection), QuantTensor)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert (copy.training, model.training) == (False, True)
    assert len(tensors) == len(list(model.parameters()))


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
    copy, tensors = decoded_copy(Plain().to(held), asked)
    assert {weight.dtype for weight in copy.parameters()} == {found}
    assert copy.norm.running_mean.dtype == found
    assert {tensor.fate for tensor in tensors} == {fate}


@pytest.mark.slow
def test_onnx_runtime_agrees_on_the_reference_model(tmp_path, reference_model):
    export(reference_model, "onnx", tmp_path / "m.onnx")
    check(reference_model, tmp_path / "m.onnx", (1, 5), (3, 17))


@pytest.mark.slow
def test_a_quantized_language_model_with_weights_in_a_second_file(tmp_path):
    model = quantized(small_model(), "int4g32")
    report = export(model, "onnx", tmp_path / "m.onnx", external_data=True, attention_mask=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    check(model, tmp_path / "m.onnx", (1, 7), (4, 12), has_mask=False)
