"""AWQ: words made by hand, and what config.json says."""

import pytest
import torch

from ptqc.codegen.dialects.awq import AWQ
from ptqc.errors import CheckpointError
from tests.export._folders import config_in, exported, quantized
from tests.export.test_gptq import stream, weight

PLACES = [0, 2, 4, 6, 1, 3, 5, 7]


def test_words_made_by_hand():
    codes = torch.randint(0, 16, (16, 64), generator=torch.Generator().manual_seed(0))
    zero = torch.randint(0, 16, (16, 2), generator=torch.Generator().manual_seed(1)).float()
    tails = AWQ().write(weight(codes, 4, 32, zero))
    places = [8 * word + place for word in range(2) for place in PLACES]
    assert tails["qweight"].shape == (64, 2)
    assert tails["qweight"][3].tolist() == stream(codes[:, 3][places], 4)
    assert tails["qzeros"][1].tolist() == stream(zero[:, 1][places], 4)
    assert tails["scales"][:, 0].tolist() == [1.0, 2.0]


def test_symmetric_weights_have_zeros_of_eight():
    assert AWQ().write(weight(torch.zeros(8, 8), 4, 8))["qzeros"].tolist() == [[0x88888888 - (1 << 32)]]


def test_what_does_not_fit():
    assert AWQ().refuses(weight(torch.zeros(4, 8), 4, 8)) == "4 outputs do not fill words of eight"
    assert "no grid of 4-bit integers" in AWQ().refuses(weight(torch.zeros(8, 8), 8, 8))


def test_the_config(tmp_path):
    exported(quantized("int4g32z"), "awq", tmp_path / "out")
    assert config_in(tmp_path / "out") == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip


@pytest.mark.parametrize("fields", [{"version": "gemv"}, {"bits": 8}, {"version": 3}])
def test_other_formats_are_named(fields):
    with pytest.raises(CheckpointError, match="convert it to gemm of 4 bits"):
        AWQ.of_config({"quant_method": "awq", "bits": 4} | fields, "config.json")
