"""Attention in Triton: the contract in the interpreter, what its machine code is made of, runs, refusals."""

import pytest
import torch

from benchmarks._attention_gates import ATTENTION_CASES, measure_attention
from ptqc.attention import AttentionRequest
from ptqc.codegen.gpu.attend import attend_in_triton, attention_tile
from ptqc.codegen.gpu.attention import attention_text
from tests.attention_contract import CASES, ODD_FEATURES
from tests.targets.interpreted import needs_triton, run_interpreted

IN_OTHER_TYPES = [name for name in (*CASES, *ODD_FEATURES) if name.startswith("float")]


def check(names):
    failures = run_interpreted(names, "tests.attention_contract")
    assert {name: failure for name, failure in zip(names, failures, strict=True) if failure} == {}


@needs_triton
def test_contract():
    check([name for name in (*CASES, *ODD_FEATURES) if name not in IN_OTHER_TYPES[2:]])


@needs_triton
@pytest.mark.slow
def test_contract_in_other_types():
    check(IN_OTHER_TYPES[2:])


def request(dtype=torch.float16, features=64, value_features=64, mask=torch.bool, device="cuda"):
    return AttentionRequest(dtype, features, value_features, mask, device)


@needs_triton
@pytest.mark.parametrize(
    ("asked", "reason"),
    [(request(device="cpu"), "run on GPUs"), (request(torch.float64), "float16, bfloat16"),
     (request(mask=torch.int64), "float16, bfloat16"), (request(features=576), "at most 256"),
     (request(torch.float32, 192), "at most 128")],
)  # fmt: skip
def test_refusals(asked, reason):
    assert reason in attend_in_triton(asked)


@needs_triton
def test_amd_has_no_exact_float32(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in attend_in_triton(request(torch.float32))
    assert not isinstance(attend_in_triton(request()), str)


@needs_triton
def test_nothing_else_is_refused():
    for features in (1, 40, 63, 80, 128, 256):
        assert not isinstance(attend_in_triton(request(features=features)), str)


def test_tiles_hold_the_queries_that_share_a_head():
    assert [attention_tile(request(), rows).rows for rows in (1, 16, 17, 33, 512)] == [16, 16, 32, 64, 64]
    assert attention_tile(request(torch.float32), 512).rows == 16
    assert [attention_tile(request(torch.float16, wide, wide), 1).keys for wide in (64, 128, 256)] == [64, 64, 32]


def test_writing_is_pure():
    assert attention_text(request()) == attention_text(request())


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [case for case in ATTENTION_CASES if case.features == 128], ids=str)
def test_the_gates_hold(case, capability, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    row = measure_attention(case, capability)
    assert row.failures == ()
    assert row.matrices
