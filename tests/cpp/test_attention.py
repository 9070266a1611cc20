"""Attention in C++: values against float64 for shapes, dtypes, masks and strides; what it refuses."""

import pytest
import torch

from ptqc.attention import AttentionRequest
from ptqc.codegen.attention import attention_for

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def attend(q, k, v, mask=None, scale=0.3):
    kind = None if mask is None else mask.dtype
    operator = attention_for(AttentionRequest(q.dtype, q.shape[-1], v.shape[-1], kind, "cpu"))
    assert not isinstance(operator, str), operator
    return operator(q, k, v, mask, scale)


def reference(q, k, v, mask=None, scale=0.3):
    q, k, v = (value.double() for value in (q, k, v))
    k, v = (value.repeat_interleave(q.shape[1] // value.shape[1], 1) for value in (k, v))
    scores = scale * q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num(0) @ v


def values(batch, heads, key_heads, queries, keys, features, value_features=None, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(heads, queries, features), (key_heads, keys, features), (key_heads, keys, value_features or features)]
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def assert_right(y, exact):
    assert y.shape == exact.shape
    assert (y.double() - exact).norm() <= LIMITS[y.dtype] * exact.norm()


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 2, 1, 200, 64), (2, 3, 3, 1, 31, 16), (1, 6, 1, 3, 1100, 48), (2, 10, 2, 1, 2100, 32, 64),
     (1, 1, 1, 8, 1, 128), (3, 4, 4, 2, 33, 16, 48)],
    ids=lambda shape: "x".join(map(str, shape)),
)  # fmt: skip
def test_values(shape, dtype):
    q, k, v = values(*shape, dtype=dtype)
    assert_right(attend(q, k, v), reference(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 1, 3, 700), (1, 8, 1, 700), (700,), (2, 8, 3, 700)])
def test_masks(dtype, shape):
    q, k, v = values(2, 8, 2, 3, 700, 32)
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = seen if dtype == torch.bool else torch.where(seen, 0.5, -torch.inf).to(dtype)
    assert_right(attend(q, k, v, mask), reference(q, k, v, mask))


def test_the_empty_rest_of_a_cache_does_not_count():
    q, k, v = values(1, 8, 2, 1, 640, 64)
    k[:, :, 100:], v[:, :, 100:] = torch.nan, torch.nan
    y = attend(q, k, v, (torch.arange(640) < 96)[None, None, None])
    assert_right(y, reference(q, k[:, :, :96], v[:, :, :96]))


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v = values(1, 4, 2, 2, 40, 16)
    mask = torch.tensor([True, False])[:, None].expand(2, 40)
    y = attend(q, k, v, mask)
    assert (y[:, :, 1] == 0).all()
    assert_right(y[:, :, :1], reference(q[:, :, :1], k, v))


def test_strides():
    q, k, v = values(2, 8, 2, 3, 90, 32)
    wide = torch.randn(2, 3, 8, 40)
    wide[..., :32] = q.transpose(1, 2)
    by_key = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in (k, v)]
    turned = v.mT.contiguous().mT
    exact = reference(q, k, v)
    assert_right(attend(wide[..., :32].transpose(1, 2), *by_key), exact)
    assert_right(attend(q, k, turned), exact)


def test_spoilt_and_huge_values_are_seen():
    q, k, v = values(1, 4, 2, 1, 40, 16)
    assert_right(attend(100 * q, k, v, scale=10.0), reference(100 * q, k, v, scale=10.0))
    k[0, 1, 7, 3] = torch.nan
    y = attend(q, k, v)
    assert y[0, 2:].isnan().all()
    assert y[0, :2].isfinite().all()


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
    from ptqc.codegen.cpp.attend import attend_in_cpp
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
    assert why in attention_for(request_)
