"""Byte orders, against the decoder of the gguf package on random bytes."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_decode import _stored
from ptqc.codegen.export._gguf_layouts import LAYOUTS, Fields, Plane


def random_blocks(name, count, seed):
    """Blocks of any bits, except that scales are finite and ternary codes have a level."""
    layout, random = LAYOUTS[name], np.random.default_rng(seed)
    blocks = random.integers(0, 256, (count, layout.nbytes), dtype=np.uint8)
    if name.startswith("TQ"):
        codes = random.integers(0, 3, (count, layout.weights), dtype=np.uint8)
        empty = np.empty((count, 0), np.uint8)
        blocks = layout.pack(Fields(codes, np.zeros((count, 1), np.float16), empty))
    for offset in layout.floats:
        scales = random.standard_normal((count, 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes_are_those_of_the_format(name):
    assert (LAYOUTS[name].weights, LAYOUTS[name].nbytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", LAYOUTS)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_every_bit_has_a_place_and_means_what_the_package_says(name, seed):
    blocks = random_blocks(name, 6, seed)
    assert np.array_equal(LAYOUTS[name].pack(LAYOUTS[name].unpack(blocks)), blocks)
    weight = _stored(TYPES[name], blocks, (6, LAYOUTS[name].weights), torch.float32, "here")
    expected = gguf.quants.dequantize(blocks, GGMLQuantizationType[name])
    assert np.array_equal(weight.dequantize().numpy(), expected)


def test_a_plane_by_hand():
    """Bit 4 of entries 0..7 in one byte, side by side; low nibbles in halves."""
    codes = np.array([[16, 1, 18, 3, 20, 5, 22, 7]], np.uint8)
    block = np.zeros((1, 5), np.uint8)
    Plane("codes", 0, 1, 1, start=4).put(codes, block)
    Plane("codes", 1, 4, 4).put(codes, block)
    assert block.tolist() == [[0b01010101, 0x40, 0x51, 0x62, 0x73]]
