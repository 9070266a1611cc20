import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ptqc.codegen.export._gguf_blocks import TYPES

BLOCKS = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.just(32)),
    elements=st.floats(-1e4, 1e4, width=32)
    | st.floats(-(2.0**-20), 2.0**-20, width=32)
    | st.sampled_from([0.0, -0.0, 1.0]),
)


def decode(encoded, name):
    return gguf.quants.dequantize(encoded, GGMLQuantizationType[name])


def test_a_q8_0_block_by_hand():
    weights = np.array([[*(0.5 * np.arange(31)), 63.5]], np.float32)
    assert TYPES["Q8_0"].encode(weights).tobytes() == bytes([0x00, 0x38, *range(31), 127])  # 0x3800 is 0.5


def test_a_q4_0_block_by_hand():
    weights = np.array([0.25 * (np.arange(32) % 16 - 8.0)], np.float32)
    expected = bytes([0x00, 0x34, *(17 * nibble for nibble in range(16))])  # 0x3400 is 0.25
    assert TYPES["Q4_0"].encode(weights).tobytes() == expected


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_sizes_are_those_of_the_format(name):
    kind = TYPES[name]
    assert (kind.weights, kind.nbytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert kind.encode(np.ones((3, kind.weights), np.float32)).shape == (3, kind.nbytes)


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_round_as_torch_rounds(name, dtype):
    weights = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(TYPES[name].encode(weights.numpy()), weights.to(dtype).view(torch.uint8).numpy())


@given(BLOCKS)
@settings(deadline=None)
def test_q8_0_is_never_off_by_more_than_half_a_step(weights):
    encoded = TYPES["Q8_0"].encode(weights)
    scale = encoded[:, :2].copy().view(np.float16).astype(np.float64)
    found = decode(encoded, "Q8_0").astype(np.float64)
    assert np.isfinite(found).all()
    assert (np.abs(found - weights) <= scale * 0.5 * (1 + 1e-5)).all()
    assert np.array_equal(found, (encoded[:, 2:].view(np.int8) * scale.astype(np.float32)).astype(np.float64))


@given(BLOCKS)
@settings(deadline=None)
def test_q4_0_takes_the_nearest_code_and_a_scale_no_worse_than_the_plain_one(weights):
    encoded = TYPES["Q4_0"].encode(weights)
    scale = encoded[:, :2].copy().view(np.float16).astype(np.float64)
    found = decode(encoded, "Q4_0").astype(np.float64)
    nearest = np.abs(weights[..., None] - scale[..., None] * np.arange(-8, 8)).min(-1)
    error = np.abs(found - weights)
    assert np.isfinite(found).all()
    assert (error <= nearest + 1e-5 * np.abs(scale)).all()
    with np.errstate(all="ignore"):  # theirs divides by subnormal scales
        plain = decode(gguf.quants.quantize(weights, GGMLQuantizationType.Q4_0), "Q4_0")
    room = 1e-6 * np.square(weights.astype(np.float64)).sum(1) + 1e-30  # the search sums in float32
    assert (np.square(error).sum(1) <= np.square(plain - weights.astype(np.float64)).sum(1) * (1 + 1e-5) + room).all()


def test_searching_the_scale_of_q4_0_pays():
    weights = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
    plain = decode(gguf.quants.quantize(weights, GGMLQuantizationType.Q4_0), "Q4_0")
    ours = decode(TYPES["Q4_0"].encode(weights), "Q4_0")
    assert np.square(ours - weights).sum() < 0.92 * np.square(plain - weights).sum()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_zeros_stay_zeros(name):
    assert not decode(TYPES[name].encode(np.zeros((4, 32), np.float32)), name).any()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_the_largest_magnitude_it_takes_stays_finite(name):
    kind = TYPES[name]
    weights = np.full((2, kind.weights), kind.largest, np.float32)
    weights[1] *= -1
    weights[:, 1:] /= 3
    found = decode(kind.encode(weights), name) if name != "BF16" else kind.encode(weights).view(np.uint16)
    assert np.isfinite(found).all()
    if name == "BF16":
        assert found[0] == 0x7F7F
