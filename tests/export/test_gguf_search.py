"""The search for scales: what it must never do, what it is worth, and that it is the same everywhere."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ptqc.codegen.export._gguf_blocks import _SEARCHES, TYPES
from tests.export._models import stored

NAMES = list(_SEARCHES)
ELEMENTS = st.floats(-1e4, 1e4, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32) | st.sampled_from([0.0, 1.0])


def decode(encoded, name):
    return gguf.quants.dequantize(encoded, GGMLQuantizationType[name])


def weights_of(rows=8, columns=512, seed=0):
    return (np.random.default_rng(seed).standard_normal((rows, columns)) / 20).astype(np.float32)


def error(weights, name, importance=None, counted=None):
    """Squared error of the type, encoded with an importance and counted with another."""
    left = decode(TYPES[name].encode(weights, importance), name) - weights
    return float((np.square(left, dtype=np.float64) * (1 if counted is None else counted)).sum())


# Of the sum of squares, on normal weights: the step of an optimal uniform quantizer would give 2 to 10% less.
WORST = {
    "Q4_0": 7e-3, "Q4_1": 5.2e-3, "Q5_0": 1.7e-3, "Q5_1": 1.25e-3, "Q2_K": 7e-2, "Q3_K": 2.15e-2, "Q4_K": 5.2e-3,
    "Q5_K": 1.3e-3, "Q6_K": 3.1e-4, "IQ4_NL": 5.6e-3, "IQ4_XS": 5.7e-3, "TQ1_0": 0.195, "TQ2_0": 0.195,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_error_on_normal_weights(name):
    weights = weights_of(64)
    assert error(weights, name) < WORST[name] * np.square(weights).sum()


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_error_it_counts(name):
    weights = weights_of(32)
    importance = np.exp(np.random.default_rng(1).standard_normal(512)).astype(np.float32)
    blind, seeing = (error(weights, name, each, importance) for each in (None, importance))
    assert seeing < 0.99 * blind


@pytest.mark.parametrize("name", NAMES)
@given(blocks=arrays(np.float32, st.tuples(st.integers(1, 3), st.just(256)), elements=ELEMENTS))
@settings(max_examples=15, deadline=None)
def test_any_block_stays_finite_and_no_worse_than_zeros(name, blocks):
    found = decode(TYPES[name].encode(blocks), name).astype(np.float64)
    total = np.square(blocks.astype(np.float64)).sum()
    assert np.isfinite(found).all()
    assert np.square(found - blocks).sum() <= total * (1 + 1e-5) + 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_the_largest_magnitude_stays_finite(name):
    kind = TYPES[name]
    assert not decode(kind.encode(np.zeros((3, 256), np.float32)), name).any()
    vast = np.full((2, 256), kind.largest, np.float32)
    vast[1] *= -1
    vast[:, 1:] /= 3
    assert np.isfinite(decode(kind.encode(vast), name)).all()


@pytest.mark.parametrize(("spec", "name"), [
    ("int4g32", "Q4_0"), ("int5g32", "Q5_0"), ("ternaryg256", "TQ2_0"), ("ternaryg256", "TQ1_0"), ("iq4_nl", "IQ4_NL"),
    ("int4g32m", "Q4_1"), ("int5g32m", "Q5_1"),
])  # fmt: skip
def test_weights_on_a_grid_are_found_again(spec, name):
    weights = stored(torch.from_numpy(weights_of(16)), spec).dequantize().numpy()
    peak = np.abs(weights).max()
    assert np.abs(decode(TYPES[name].encode(weights), name) - weights).max() < 2e-3 * peak


@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_as_good_as_the_whole(name):
    """Sums of other lengths may round otherwise and decide a tie, no more."""
    weights = weights_of(6)
    parts = error(weights[:2], name) + error(weights[2:, :256], name) + error(weights[2:, 256:], name)
    assert parts == pytest.approx(error(weights, name), rel=2e-3)
