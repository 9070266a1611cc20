"""The search in integers beside the one in floats."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from ptqc.codegen.export._gguf_blocks import _QUICK, _SEARCHES, TYPES
from ptqc.codegen.export._gguf_quick import LARGEST_BIAS, LARGEST_FACTOR

NAMES = list(_QUICK)


def error(fields, name, weights):
    encoded = TYPES[name].layout.pack(fields).reshape(len(weights), -1)
    left = gguf.quants.dequantize(encoded, GGMLQuantizationType[name]) - weights
    return np.square(left, dtype=np.float64).reshape(-1, 32).sum(axis=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tails", [3, 1000])
def test_it_is_nearly_as_good_as_the_search_in_floats(name, tails):
    weights = np.random.default_rng(0).standard_t(tails, (64, 512)).astype(np.float32)
    quick = error(_QUICK[name].run(weights), name, weights)
    full = error(_SEARCHES[name].run(weights, None), name, weights)
    assert quick.sum() < 1.07 * full.sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_levels_are_the_nearest_under_the_stored_scale(name, magnitude):
    """Moving any code by one does not lower the error: the integers are fine enough."""
    weights = (np.random.default_rng(0).standard_normal((16, 512)) * magnitude).astype(np.float32)
    fields, spec = _QUICK[name].run(weights), _QUICK[name].search.spec
    best = error(fields, name, weights)
    scale = np.abs(fields.floats[:, 0].astype(np.float64))
    for step in (-1, 1):
        for place in range(32):
            moved = fields.codes.copy()
            moved[:, place] = np.clip(moved[:, place].astype(int) + step, 0, 2**spec.bits - 1)
            other = error(type(fields)(moved, fields.floats, fields.scales), name, weights)
            assert (other > best - 0.006 * scale**2).all()  # a tie within 0.003 of a level may go either way


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_far_from_the_others_costs_them_no_more_than_it_must(name):
    weights = np.full((4, 512), 0.01, np.float32)
    weights[:, ::32] = [[1.0], [-1.0], [100.0], [0.0]]
    quick = error(_QUICK[name].run(weights), name, weights)
    full = error(_SEARCHES[name].run(weights, None), name, weights)
    step = np.repeat([1.0, 1.0, 100.0, 0.01], 16) / (2 ** _QUICK[name].search.spec.bits - 1)
    assert (quick <= 1.05 * full + 32 * (0.02 * step) ** 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_candidates_fit_sixteen_bits(name):
    for factor, bias in _QUICK[name].candidates:
        assert abs(factor) < LARGEST_FACTOR and abs(bias) < LARGEST_BIAS
    assert LARGEST_FACTOR + LARGEST_BIAS + (1 << _QUICK[name].fraction) // 2 < 2**15
