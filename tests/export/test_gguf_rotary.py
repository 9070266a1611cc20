import math

import pytest
import torch
from gguf import Keys

from ptqc.codegen.export._gguf_rotary import rotary_factors, rotary_fields
from ptqc.errors import ExportError
from tests.export._models import small_model


def config(**parameters):
    return small_model(num_hidden_layers=1, rope_parameters={"rope_theta": 10000.0, **parameters}).config


def fields(**parameters):
    return {key: value for key, _, value in rotary_fields(config(**parameters))}


def test_without_scaling_there_is_only_the_base():
    assert fields(rope_type="default") == {Keys.Rope.FREQ_BASE: 10000.0}
    assert rotary_factors(config(rope_type="default")) is None


def test_linear_scaling_is_a_factor():
    found = fields(rope_type="linear", factor=4.0)
    assert (found[Keys.Rope.SCALING_TYPE], found[Keys.Rope.SCALING_FACTOR]) == ("linear", 4.0)


def test_yarn_says_how_its_attention_differs_from_the_usual():
    usual = fields(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    assert usual[Keys.Rope.SCALING_ATTN_FACTOR] == pytest.approx(1)
    assert usual[Keys.Rope.SCALING_ORIG_CTX_LEN] == 128
    other = fields(rope_type="yarn", factor=4.0, original_max_position_embeddings=128, attention_factor=1.5)
    assert other[Keys.Rope.SCALING_ATTN_FACTOR] == pytest.approx(1.5 / (0.1 * math.log(4) + 1))


def test_llama3_divides_long_wavelengths_by_the_factor_and_leaves_short_ones():
    factors = rotary_factors(
        config(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    )
    assert factors is not None
    wavelengths = 2 * math.pi * 10000.0 ** (torch.arange(8) / 8)
    assert torch.allclose(factors[wavelengths < 64 / 4], torch.tensor(1.0))
    assert torch.allclose(factors[wavelengths > 64], torch.tensor(8.0))
    between = factors[(wavelengths > 64 / 4) & (wavelengths < 64)]
    assert ((between > 1) & (between < 8)).all()
    assert len(between) > 0


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'; it has default, llama3, linear, yarn"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
            "beta_fast=32",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(parameters, said):
    with pytest.raises(ExportError, match=said):
        rotary_fields(config(**parameters))
