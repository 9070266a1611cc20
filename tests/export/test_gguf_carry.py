"""Stored weights in GGUF types: which are carried over, and that nothing moves."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_carry import carried
from ptqc.codegen.export._gguf_encode import encode_weight, fate_of
from tests.export._models import stored


def weight_of(rows=6, columns=512):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 8


def decode(encoded, name):
    return torch.from_numpy(gguf.quants.dequantize(encoded, GGMLQuantizationType[name]))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("int4g32z", "Q5_0"), ("int4g128z", "Q5_0"), ("int4g32m", "Q4_1"), ("int4g64m", "Q5_1"), ("int3g32m", "Q4_1"),
        ("q2_K", "Q2_K"), ("q3_K", "Q3_K"), ("q4_K", "Q4_K"), ("q5_K", "Q5_K"), ("q6_K", "Q6_K"),
        ("iq4_nl", "IQ4_NL"), ("iq4_xs", "IQ4_XS"), ("tq2_0", "TQ1_0"), ("ternaryg256", "TQ2_0"),
    ],
)  # fmt: skip
def test_what_a_type_holds_is_carried_over_exactly(spec, name):
    weight = stored(weight_of(), spec)
    assert fate_of(weight, TYPES[name]) == "lossless"
    assert torch.equal(decode(encode_weight(weight, TYPES[name], "w"), name), weight.dequantize())


@pytest.mark.parametrize("spec", ["int4g32z", "int4g128z", "int3g32z"])
def test_an_integer_zero_becomes_a_minimum_in_float16(spec):
    weight = stored(weight_of() + 0.05, spec)
    assert fate_of(weight, TYPES["Q4_1"]) == "requantized"
    found = decode(encode_weight(weight, TYPES["Q4_1"], "w"), "Q4_1")
    assert not torch.equal(found, weight.dequantize())
    assert (found - weight.dequantize()).abs().max() < 2**-11 * weight.dequantize().abs().max()


@pytest.mark.parametrize("spec", ["q4_K", "q2_K", "q3_K", "iq4_xs"])
def test_rows_of_superblocks_can_be_put_in_another_order(spec):
    weight, order = stored(weight_of(), spec), torch.tensor([3, 0, 5, 1, 4, 2])
    arranged = weight.index_select(0, order)
    assert arranged.spec == weight.spec
    assert torch.equal(arranged.dequantize(), weight.dequantize()[order])


@pytest.mark.parametrize(
    ("spec", "name"),
    [("int4g32m", "Q5_0"), ("int5g32m", "Q4_1"), ("q4_K", "Q5_K"), ("int4g32", "Q4_K"), ("nf4g32", "IQ4_NL"),
     ("int4g16m", "Q4_1"), ("int4g32f", "Q4_1")],
)  # fmt: skip
def test_other_grids_are_not(spec, name):
    assert carried(stored(weight_of(), spec), TYPES[name]) is None
