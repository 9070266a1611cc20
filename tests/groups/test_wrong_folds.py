"""Folds that hand-written tables get wrong: each is refused here, or right."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.groups.structures import Model, RMSNorm, attention, groups_of, kinds, linear


def test_a_norm_behind_attention_is_no_producer_of_the_mlp():
    def run(m, x):
        x = x + m.post(m.o(m.v(m.pre(x))))
        return x + m.down(F.gelu(m.gate(m.pre2(x))) * m.up(m.pre2(x)))

    norms = {name: RMSNorm(offset=1.0) for name in ("pre", "post", "pre2")}
    found = groups_of(Model(run, **norms, **{name: linear() for name in ("v", "o", "gate", "up", "down")}))
    producers = {group.names: [entry.name for entry in group.producer] for group in found}
    assert producers["gate.weight", "up.weight"] == ["pre2.weight"]
    assert all("post.weight" not in names for names in producers.values())


def test_a_router_that_cannot_be_compensated_forbids_the_fold():
    def run(m, x):
        h = m.norm(x)
        scores = F.normalize(h, dim=-1) @ m.router.t()
        return x + m.fc1(h) * scores.sum(-1, keepdim=True)

    model = Model(run, norm=RMSNorm(), fc1=linear(), router=nn.Parameter(torch.randn(3, 16)))
    assert "fold" not in {kind for names, kind in kinds(model).items() if "fc1" in names}


def test_the_gate_of_a_gated_mlp_is_no_producer():
    def run(m, x):
        h = m.norm(x)
        return x + m.w2(F.silu(m.w1(h)) * m.w3(h))

    found = groups_of(Model(run, norm=RMSNorm(), w1=linear(), w2=linear(), w3=linear()))
    group = next(group for group in found if group.names == ("w2.weight",))
    assert [entry.name for entry in group.producer] == ["w3.weight"]


def test_the_last_rows_of_an_interleaved_projection_are_not_the_values():
    def run(m, x):
        heads = m.wqkv(m.norm(x)).view(2, 8, 2, 4, 4)
        q, k, v = heads[..., :2, :].flatten(-3), heads[..., 2, :].flatten(-2), heads[..., 3, :].flatten(-2)
        return x + m.o(attention(q, k, v, 4, 2))

    found = groups_of(Model(run, norm=RMSNorm(), wqkv=linear(16, 32, True), o=linear()))
    group = next(group for group in found if group.names == ("o.weight",))
    for entry in group.producer:
        assert (entry.channel >= 0).nonzero().flatten().tolist() == [*range(12, 16), *range(28, 32)]


def test_an_up_side_that_is_clamped_or_shifted_is_no_producer():
    for change in (lambda up: up.clamp(-1, 1), lambda up: up + 1):

        def run(m, x, change=change):
            h = m.norm(x)
            return x + m.down(F.silu(m.gate(h)) * change(m.up(h)))

        found = kinds(Model(run, norm=RMSNorm(), gate=linear(), up=linear(), down=linear()))
        assert found[frozenset({"down"})] == "run-time"


def test_a_weight_tied_to_the_embedding_is_refused():
    def run(m, x):
        ids = (x[..., 0] > 0).long()
        return F.linear(m.norm(x + F.embedding(ids, m.table)), m.table)

    (group,) = groups_of(Model(run, norm=RMSNorm(), table=nn.Parameter(torch.randn(20, 16))))
    assert group.kind == "refused"
    assert "tied to the embedding" in group.reason


def test_a_norm_whose_output_is_returned_is_no_producer():
    def run(m, x):
        h = m.norm(x)
        return torch.cat([m.fc1(h), h], -1)

    assert kinds(Model(run, norm=RMSNorm(), fc1=linear())) == {frozenset({"fc1"}): "run-time"}


def test_a_norm_that_is_used_twice_needs_both_uses_to_agree():
    def run(m, x):
        return m.norm(x + m.fc1(m.norm(x)))

    assert kinds(Model(run, norm=RMSNorm(), fc1=linear())) == {frozenset({"fc1"}): "run-time"}


def test_a_weight_with_two_inputs_needs_both_to_scale_alike():
    def run(m, x):
        return m.fc(m.norm(x)) + m.fc(x)

    assert kinds(Model(run, norm=RMSNorm(), fc=linear())) == {frozenset({"fc"}): "run-time"}


def test_a_bias_that_is_shared_is_no_part_of_a_producer():
    def run(m, x):
        return m.fc2(F.relu(F.linear(x, m.w, m.b))) + m.b

    model = Model(run, w=nn.Parameter(torch.randn(16, 16)), b=nn.Parameter(torch.randn(16)), fc2=linear())
    assert kinds(model)[frozenset({"fc2"})] == "run-time"


def test_softmax_over_the_channels_and_attention_scores_are_in_the_way():
    def run(m, x):
        return m.fc2(torch.softmax(m.fc1(x), -1)) + m.fc3((m.q(x) @ m.q(x).transpose(1, 2)) @ x)

    found = kinds(Model(run, **{name: linear() for name in ("fc1", "fc2", "fc3", "q")}))
    assert "fold" not in found.values()
