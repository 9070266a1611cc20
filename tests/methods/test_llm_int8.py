"""LLM.int8(): int8 weights, and the threshold that its inputs carry."""

import pytest

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.passes.methods.llm_int8 import LlmInt8
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


def test_promises():
    check_method(LlmInt8())


def test_threshold():
    assert LlmInt8().activation == ActSpec.parse("int8-token-outlier6")
    assert LlmInt8(3).activation == ActSpec.parse("int8-token-outlier3")
    assert LlmInt8().spec() == WeightSpec.parse("int8")
    for threshold in (0, -1.0, float("inf")):
        with pytest.raises(SpecError, match="positive threshold"):
            LlmInt8(threshold)
