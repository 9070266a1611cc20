"""Packing pairs are exact inverses, and the byte order is the documented one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptqc.packing import PACKINGS, pack_base3, pack_linear, unpack_base3, unpack_linear


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**31))
def test_linear_round_trip(bits, n, rows, seed):
    codes = torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_linear(codes, bits)
    assert packed.shape == (rows, PACKINGS["linear"].row_bytes(bits, n))
    assert torch.equal(unpack_linear(packed, bits, n), codes)


@given(st.integers(1, 70), st.integers(0, 2**31))
def test_base3_round_trip(n, seed):
    codes = torch.randint(0, 3, (2, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_base3(codes, 2)
    assert packed.shape == (2, PACKINGS["base3"].row_bytes(2, n))
    assert torch.equal(unpack_base3(packed, 2, n), codes)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_wide_codes_are_little_endian(bits):
    codes = torch.tensor([[0x01, (1 << bits) - 2], [0x0102, 1 << (bits - 1)]])
    packed = pack_linear(codes, bits)
    assert packed.shape == (2, PACKINGS["linear"].row_bytes(bits, 2))
    assert bytes(packed[0].tolist()) == b"".join(int(code).to_bytes(bits // 8, "little") for code in codes[0])
    assert torch.equal(unpack_linear(packed, bits, 2), codes)


def test_bytes_by_hand():
    assert pack_linear(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    # 3 bits: 5, 1, 7 -> 101 | 001<<3 | 111<<6 = 0b1_11_001_101 -> low byte 11001101, carry 1
    assert pack_linear(torch.tensor([[5, 1, 7]], dtype=torch.uint8), 3).tolist() == [[0b11001101, 0b1]]
    assert pack_base3(torch.tensor([[2, 1, 0, 0, 1]], dtype=torch.uint8), 2).tolist() == [[2 + 3 + 81]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_linear_is_one_little_endian_stream(bits):
    codes = torch.randint(0, 2**bits, (24,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stream = sum(int(code) << (bits * k) for k, code in enumerate(codes))
    assert bytes(pack_linear(codes, bits).tolist()) == stream.to_bytes(bits * 3, "little")
