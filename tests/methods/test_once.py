"""What is made of a Hessian is made once for weights that share it, and does not outlive it."""

import gc
from functools import partial

import torch

from ptqc.passes.methods import gptq
from ptqc.passes.methods._once import _last, once_for


def test_the_same_tensor_and_key_are_asked_once():
    hessian, calls = torch.eye(4), []
    for key in (1, 1, 2, 2):
        once_for(hessian, key, partial(calls.append, key))
    assert calls == [1, 2]


def test_an_equal_tensor_is_not_the_same():
    calls = []
    for hessian in (torch.eye(4), torch.eye(4)):
        once_for(hessian, 1, lambda: calls.append(1))
    assert len(calls) == 2


def test_nothing_outlives_the_hessian():
    hessian = torch.eye(4)
    once_for(hessian, 1, object)
    del hessian
    gc.collect()
    assert not _last


def test_weights_that_share_a_hessian_are_factored_once(monkeypatch, seeded):
    calls = []
    factor = gptq.factor
    monkeypatch.setattr(gptq, "factor", lambda *arguments: calls.append(1) or factor(*arguments))
    x, method = torch.randn(64, 32), gptq.Gptq()
    statistics = {"hessian": x.T @ x / 64}
    spec = method.spec(4, 16)
    for _ in range(3):
        method.choose(torch.randn(8, 32), spec, statistics)
    assert len(calls) == 1
