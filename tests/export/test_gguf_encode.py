import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from ptqc.codegen.export import _gguf_encode
from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_encode import encode_weight, exact_type, fate_of
from ptqc.errors import ExportError
from tests.export._models import stored


def weight_of(rows=6, columns=128):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 8


def decode(encoded, name):
    return torch.from_numpy(gguf.quants.dequantize(encoded, GGMLQuantizationType[name]))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("int4g32", "Q4_0"), ("int4g64", "Q4_0"), ("int4", "Q4_0"), ("int3g32", "Q4_0"), ("int2g32", "Q4_0"),
        ("ternaryg32", "Q4_0"), ("int8g32", "Q8_0"), ("int8g128", "Q8_0"), ("int4g32", "Q8_0"), ("int4g32z", "Q8_0"),
        ("int3g32z", "Q4_0"), ("iq4_nl", "Q8_0"),
    ],
)  # fmt: skip
def test_a_grid_the_type_has_is_carried_over_exactly(spec, name):
    weight = stored(weight_of(), spec)
    assert fate_of(weight, TYPES[name]) == "lossless"
    assert torch.equal(decode(encode_weight(weight, TYPES[name], "w"), name), weight.dequantize())


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("int4g32z", "Q4_0"), ("int8g32", "Q4_0"), ("int4g16", "Q4_0"), ("int4g32m", "Q8_0"), ("int4g32f", "Q8_0"),
        ("nf4g64", "Q4_0"), ("fp8e4m3", "Q8_0"), ("int4g32-f32", "Q4_0"), ("int8t", "Q8_0"), ("mxfp4", "Q4_0"),
    ],
)  # fmt: skip
def test_another_grid_is_decoded_and_encoded_again(spec, name):
    weight = stored(weight_of(), spec)
    assert fate_of(weight, TYPES[name]) == "requantized"
    plain = encode_weight(weight.dequantize(), TYPES[name], "w")
    assert np.array_equal(encode_weight(weight, TYPES[name], "w"), plain)


def test_a_transposed_weight_is_read_in_its_own_orientation():
    weight = stored(weight_of(64, 128).T.contiguous(), "int4g32", is_transposed=True)
    assert fate_of(weight, TYPES["Q4_0"]) == "requantized"
    found = decode(encode_weight(weight, TYPES["Q8_0"], "w"), "Q8_0")
    assert torch.allclose(found, weight.dequantize(), atol=2e-3)


@pytest.mark.parametrize(
    ("dtype", "name", "fate"),
    [
        (torch.float16, "F16", "lossless"), (torch.bfloat16, "BF16", "lossless"), (torch.bfloat16, "F32", "lossless"),
        (torch.float32, "F16", "converted"), (torch.bfloat16, "F16", "converted"), (torch.float32, "Q8_0", "converted"),
    ],
)  # fmt: skip
def test_the_fate_of_floats(dtype, name, fate):
    assert fate_of(weight_of().to(dtype), TYPES[name]) == fate


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (weight_of(), "F32"), (weight_of().half(), "F16"), (weight_of().bfloat16(), "BF16"),
        (stored(weight_of(), "int4g32"), "Q4_0"), (stored(weight_of(), "int8g64"), "Q8_0"),
        (stored(weight_of(), "int5g32"), "Q5_0"), (stored(weight_of().half(), "nf4g64"), "F16"),
    ],
)  # fmt: skip
def test_the_smallest_type_that_holds_a_weight_as_it_is(weight, name):
    assert exact_type(weight, weight.shape[-1]) == name


@pytest.mark.parametrize("spec", [None, "int4g32", "int4g32z", "nf4g64"])
def test_pieces_make_the_same_bytes_as_the_whole(monkeypatch, spec):
    weight = weight_of(7) if spec is None else stored(weight_of(7), spec)
    whole = encode_weight(weight, TYPES["Q8_0"], "w")
    monkeypatch.setattr(_gguf_encode, "_WEIGHTS_AT_ONCE", 300)
    assert np.array_equal(encode_weight(weight, TYPES["Q8_0"], "w"), whole)


def test_a_vector_has_one_axis():
    vector = torch.arange(5.0)
    assert np.array_equal(encode_weight(vector, TYPES["F32"], "w").view(np.float32), vector.numpy())


@pytest.mark.parametrize(("value", "name", "said"), [
    (float("nan"), "Q4_0", "NaN or infinite"), (float("inf"), "F32", "NaN or infinite"),
    (1e5, "F16", "use BF16 or F32"), (1e7, "Q8_0", "use BF16 or F32"),
])  # fmt: skip
def test_values_that_no_code_stands_for_are_an_error_with_the_name(value, name, said):
    weight = weight_of()
    weight[3, 5] = value
    with pytest.raises(ExportError, match=f'"layers.3.up" holds .*{said}'):
        encode_weight(weight, TYPES[name], "layers.3.up")
