"""Attention in C++: the contract, threads, instruction sets, refusals."""

import pytest
import torch

from ptqc.attention import AttentionRequest
from ptqc.codegen.cpp.attend import attend_in_cpp
from tests.attention_contract import CASES, assert_right, attend, reference, values


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    CASES[name]()


def test_any_number_of_threads_gives_the_same_bits():
    q, k, v = values(1, 8, 2, 1, 5000, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attend(q, k, v))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_every_instruction_set(monkeypatch):
    from ptqc.codegen.cpp.isa import ISAS, cpu_flags

    q, k, v = values(1, 6, 2, 1, 300, 32)
    tried = [name for name, isa in ISAS.items() if isa.needs <= cpu_flags()]
    for name in tried:
        monkeypatch.setenv("PTQC_CPU_ISA", name)
        operator = attend_in_cpp(AttentionRequest(q.dtype, 32, 32, None, "cpu"))
        assert_right(operator(q, k, v, None, 0.3), reference(q, k, v))
    assert "portable" in tried


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (AttentionRequest(torch.float64, 64, 64, None, "cpu"), "float32, bfloat16"),
        (AttentionRequest(torch.float32, 64, 64, torch.int64, "cpu"), "float32, bfloat16"),
        (AttentionRequest(torch.float32, 64, 64, None, "cuda"), "on the CPU"),
        (AttentionRequest(torch.float32, 63, 64, None, "cpu"), "multiple of"),
    ],
)
def test_refusals(request_, why):
    assert why in attend_in_cpp(request_)
