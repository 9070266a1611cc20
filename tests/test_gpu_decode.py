"""The script for GPUs runs from end to end, on a tiny model without one."""

import argparse

import pytest

from benchmarks.gpu_decode import ALLOWED, run


@pytest.mark.slow
def test_rehearsal():
    given = argparse.Namespace(rehearse=True, quick=True, formats=["int4g32"], layers=2, minutes=5.0)
    float_row, stored = run(given)
    assert float_row.side == "bfloat16"
    assert sum(stored.kernels.values()) == 18  # 2 graphs of 2 layers with 4 products each, and the head
    assert 0 < stored.error <= ALLOWED
