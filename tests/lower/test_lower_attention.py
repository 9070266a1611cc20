"""lower-attention: each rule, where it stops, and the values."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.lower._graphs import lower


class Attention(nn.Module):
    """`function(q, k, v)` with what it needs around it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def plain(q, k, v, **options):
    return functional.scaled_dot_product_attention(q, k, v, **options)


def repeated(value, times):
    batch, heads, keys, features = value.shape
    return value[:, :, None, :, :].expand(batch, heads, times, keys, features).reshape(batch, -1, keys, features)


Q, K = normal(2, 8, 1, 32), normal(2, 2, 50, 32)
SEEN = (torch.arange(50) < 40)[None, None, None]
FORMS = {
    "sliced and expanded": lambda q, k, v: plain(q, repeated(k, 4), repeated(v, 4)),
    "unsqueezed": lambda q, k, v: plain(
        q, *[x.unsqueeze(2).expand(2, 2, 4, 50, 32).reshape(2, 8, 50, 32) for x in (k, v)]
    ),
    "interleaved": lambda q, k, v: plain(q, *[x.repeat_interleave(4, 1) for x in (k, v)]),
    "enable_gqa": lambda q, k, v: plain(q, k, v, enable_gqa=True),
    "masked": lambda q, k, v: plain(q, repeated(k, 4), repeated(v, 4), attn_mask=SEEN, scale=0.5),
    "with a bias": lambda q, k, v: plain(q, repeated(k, 4), repeated(v, 4), attn_mask=SEEN.float()),
}


@pytest.mark.parametrize("form", FORMS)
def test_heads_that_share_keys(form):
    done = lower(Attention(FORMS[form]), Q, K, K.flip(2))
    assert done.counts["lower-attention"] == 1
    assert [call for call in done.calls if "attend" in call]
    assert not {"expand", "reshape", "repeat_interleave"} & set(done.calls)
    torch.testing.assert_close(done.output, FORMS[form](Q, K, K.flip(2)), rtol=1e-5, atol=1e-5)


def test_heads_of_their_own():
    q, k = normal(1, 4, 3, 16), normal(1, 4, 20, 16)
    done = lower(Attention(plain), q, k, k.flip(2))
    assert done.counts["lower-attention"] == 1
    torch.testing.assert_close(done.output, plain(q, k, k.flip(2)), rtol=1e-5, atol=1e-5)


def test_a_repetition_in_another_order_is_kept():
    """Tiled heads: head h reads keys h mod 2."""

    def tiled(q, k, v):
        return plain(q, *[x[:, None].expand(2, 4, 2, 50, 32).reshape(2, 8, 50, 32) for x in (k, v)])

    done = lower(Attention(tiled), Q, K, K.flip(2))
    assert done.counts["lower-attention"] == 1
    torch.testing.assert_close(done.output, tiled(Q, K, K.flip(2)), rtol=1e-5, atol=1e-5)


def test_keys_written_after_their_repetition():
    def late(q, k, v):
        wide, k = repeated(k, 4), k.mul_(2)
        return plain(q, wide, repeated(v, 4))

    want = late(Q, K.clone(), K.flip(2))
    done = lower(Attention(late), Q, K.clone(), K.flip(2), is_checked=False)
    assert done.counts["lower-attention"] == 1
    torch.testing.assert_close(done.output, want, rtol=1e-5, atol=1e-5)


def widened(q, k, v, mask):
    return plain(q, repeated(k, 4), repeated(v, 4), attn_mask=mask[:, None].expand(2, 8, 1, 50))


def test_a_mask_is_read_before_it_is_expanded():
    mask = (torch.arange(50) < 40)[None, None].clone()
    done = lower(Attention(widened), Q, K, K.flip(2), mask)
    assert done.counts["lower-attention"] == 1
    assert "expand" not in done.calls
    torch.testing.assert_close(done.output, widened(Q, K, K.flip(2), mask), rtol=1e-5, atol=1e-5)


def test_a_mask_that_is_written_keeps_its_place():
    def changed(q, k, v, mask):
        wide = mask[:, None].expand(2, 8, 1, 50)
        mask.logical_not_()
        return plain(q, repeated(k, 4), repeated(v, 4), attn_mask=wide)

    mask = (torch.arange(50) < 40)[None, None].clone()
    want = changed(Q, K, K.flip(2), mask.clone())
    done = lower(Attention(changed), Q, K, K.flip(2), mask, is_checked=False)
    assert done.counts["lower-attention"] == 1
    assert "expand" in done.calls
    torch.testing.assert_close(done.output, want, rtol=1e-5, atol=1e-5)


def test_heads_whose_number_is_found_out_later():
    def forward(q, k, v):
        keys = k.shape[2]
        wide = [x[:, :, None].expand(2, 2, 4, keys, 32).reshape(2, 8, keys, 32) for x in (k, v)]
        return plain(q.view(2, 8, 1, 32), *wide, scale=0.25)

    done = lower(Attention(forward), Q, K, K.flip(2), dynamic=True, is_checked=False)
    assert done.counts["lower-attention"] == 1
    torch.testing.assert_close(done.output, forward(Q, K, K.flip(2)), rtol=1e-5, atol=1e-5)


LEFT = {
    "many queries": (normal(1, 4, 64, 16), {}),
    "dropout": (normal(1, 4, 1, 16), {"dropout_p": 0.5}),
    "causal": (normal(1, 4, 3, 16), {"is_causal": True}),
    "odd features": (normal(1, 4, 1, 15), {}),
    "float64": (normal(1, 4, 1, 16).double(), {}),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_torch(case):
    q, options = LEFT[case]
    done = lower(Attention(lambda q, k, v: plain(q, k, v, **options)), q, q, q, is_checked=case != "dropout")
    assert done.counts["lower-attention"] == 0


def test_training_is_left_to_torch():
    q = normal(1, 4, 1, 16).requires_grad_()
    done = lower(Attention(plain), q, q, q, needs_grad=True, is_checked=False)
    assert done.counts["lower-attention"] == 0


def test_an_unknown_number_of_queries_is_left_to_torch():
    q = normal(1, 4, 5, 16)
    torch._dynamo.mark_dynamic(q, 2)
    done = lower(Attention(plain), q, normal(1, 4, 20, 16), normal(1, 4, 20, 16), is_checked=False)
    assert done.counts["lower-attention"] == 0
