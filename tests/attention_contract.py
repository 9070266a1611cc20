"""What every kernel for attention of few queries must do: cases with values held against float64.

`python -m tests.attention_contract`, in a process of its own with TRITON_INTERPRET=1, runs the cases that a JSON list
names on stdin, and writes what went wrong with each.
"""

import json
import sys
import traceback
from functools import partial

import torch

from ptqc.attention import AttentionRequest
from ptqc.codegen.attention import attention_for

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [
    (1, 8, 2, 1, 200, 64), (2, 3, 3, 1, 31, 16), (1, 6, 1, 3, 1100, 48), (1, 1, 1, 8, 1, 128), (2, 4, 2, 2, 33, 16, 48),
    (1, 12, 1, 8, 130, 96),
]  # fmt: skip
"""batch, heads, heads of keys, queries, keys, features, value features where they differ."""
LONG = (2, 10, 2, 1, 2100, 32, 64)


def attend(q, k, v, mask=None, scale=0.3):
    kind = None if mask is None else mask.dtype
    operator = attention_for(AttentionRequest(q.dtype, q.shape[-1], v.shape[-1], kind, "cpu"))
    assert not isinstance(operator, str), operator
    y = operator(q, k, v, mask, scale)
    assert torch.equal(operator(q, k, v, mask, scale).nan_to_num(9), y.nan_to_num(9))
    return y


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


def of_shape(shape, dtype):
    q, k, v = values(*shape, dtype=dtype)
    assert_right(attend(q, k, v), reference(q, k, v))


def with_mask(shape, dtype):
    q, k, v = values(2, 4, 2, 3, 290, 32)
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = seen if dtype == torch.bool else torch.where(seen, 0.5, -torch.inf).to(dtype)
    assert_right(attend(q, k, v, mask), reference(q, k, v, mask))


def the_empty_rest_of_a_cache_does_not_count():
    q, k, v = values(1, 8, 2, 1, 640, 64)
    k[:, :, 128:], v[:, :, 128:] = torch.nan, torch.nan
    y = attend(q, k, v, (torch.arange(640) < 128)[None, None, None])
    assert_right(y, reference(q, k[:, :, :128], v[:, :, :128]))


def what_a_window_has_left_does_not_count():
    q, k, v = values(1, 8, 2, 1, 640, 64)
    k[:, :, :256], v[:, :, :256] = torch.nan, torch.nan
    y = attend(q, k, v, (torch.arange(640) >= 257)[None, None, None])
    assert_right(y, reference(q, k[:, :, 257:], v[:, :, 257:]))


def a_query_that_sees_nothing_gets_zeros():
    for keys in (40, 700):
        q, k, v = values(1, 4, 2, 2, keys, 16)
        mask = torch.tensor([True, False])[:, None].expand(2, keys)
        y = attend(q, k, v, mask)
        assert (y[:, :, 1] == 0).all()
        assert_right(y[:, :, :1], reference(q[:, :, :1], k, v))


def nobody_sees_anything():
    q, k, v = values(1, 4, 2, 1, 300, 16)
    assert (attend(q, k, v, torch.zeros(300, dtype=torch.bool)) == 0).all()
    assert (attend(q, k[:, :, :0], v[:, :, :0]) == 0).all()


def any_strides():
    q, k, v = values(2, 8, 2, 3, 90, 32)
    wide = torch.randn(2, 3, 8, 40)
    wide[..., :32] = q.transpose(1, 2)
    by_key = [value.transpose(1, 2).contiguous().transpose(1, 2) for value in (k, v)]
    turned = v.mT.contiguous().mT
    exact = reference(q, k, v)
    assert_right(attend(wide[..., :32].transpose(1, 2), *by_key), exact)
    assert_right(attend(q, k, turned), exact)


def spoilt_and_huge_values_are_seen():
    q, k, v = values(1, 4, 2, 1, 40, 16)
    assert_right(attend(100 * q, k, v, scale=10.0), reference(100 * q, k, v, scale=10.0))
    k[0, 1, 7, 3] = torch.nan
    y = attend(q, k, v)
    assert y[0, 2:].isnan().all()
    assert y[0, :2].isfinite().all()


def named(dtype):
    return str(dtype).removeprefix("torch.")


CASES = {
    **{f"{named(dtype)} {'x'.join(map(str, shape))}": partial(of_shape, shape, dtype)
       for dtype in LIMITS for shape in SHAPES},
    "bfloat16 long": partial(of_shape, LONG, torch.bfloat16),
    **{f"{named(dtype)} mask {'x'.join(map(str, shape))}": partial(with_mask, shape, dtype)
       for dtype in (torch.bool, *LIMITS) for shape in ((2, 1, 3, 290), (1, 4, 1, 290), (290,), (2, 4, 3, 290))},
    **{function.__name__: function for function in (
        the_empty_rest_of_a_cache_does_not_count, what_a_window_has_left_does_not_count,
        a_query_that_sees_nothing_gets_zeros, nobody_sees_anything, any_strides, spoilt_and_huge_values_are_seen)},
}  # fmt: skip
"""By name; each raises AssertionError where a kernel is wrong."""
ODD_FEATURES = {
    f"{named(dtype)} {'x'.join(map(str, shape))}": partial(of_shape, shape, dtype)
    for dtype in LIMITS for shape in ((2, 4, 2, 1, 70, 63, 40), (1, 3, 1, 2, 200, 80), (1, 2, 2, 1, 33, 1, 100))
}  # fmt: skip
"""More cases, for kernels that take heads of any features."""


def failure(name):
    """What went wrong with a case, "" if nothing did."""
    try:
        (CASES | ODD_FEATURES)[name]()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    json.dump([failure(name) for name in json.load(sys.stdin)], sys.stdout)
