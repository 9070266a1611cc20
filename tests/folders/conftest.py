"""A float folder to quantize, and a place to write to."""

import pytest
import torch

from tests.tiny import tiny


@pytest.fixture
def source(tmp_path):
    """A float folder in its own place, so that the output's parent can be looked at alone."""
    folder = tmp_path / "source"
    tiny("plain", torch.bfloat16).save_pretrained(folder)
    (tmp_path / "work").mkdir()
    return folder


@pytest.fixture
def out(tmp_path):
    """Where to write; its parent must be empty after a failure."""
    return tmp_path / "work" / "out"
