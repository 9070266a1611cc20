"""W8A8: int8 weights, and what is declared about inputs."""

import pytest

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.methods import METHODS
from ptqc.passes.methods.w8a8 import W8A8
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


def test_promises():
    check_method(W8A8())


def test_inputs():
    assert W8A8().activation == ActSpec.parse("int8-token")
    assert W8A8("tensor").activation == ActSpec.parse("int8-tensor")
    assert W8A8("static").activation == ActSpec.parse("int8-tensor-static")
    assert METHODS.get("int8") is not METHODS.get("w8a8")
    assert W8A8().spec() == WeightSpec.parse("int8")
    with pytest.raises(SpecError, match="inputs are not quantized by 'row'; use float, token, tensor, static"):
        W8A8("row")
