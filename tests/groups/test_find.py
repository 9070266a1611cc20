"""The structures seen in real models: which weights are in which group, and that folds keep the function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.groups.structures import WIDTH, Model, RMSNorm, attention, groups_of, kinds, linear


def _qkv(m, x):
    h = m.norm(x)
    return x + m.o(attention(m.q(h), m.k(h), m.v(h)))


def _gqa(m, x):
    h = m.norm(x)
    return x + m.o(attention(m.q(h), m.k(h), m.v(h), 4, 2))


def _fused_blocks(m, x):
    q, k, v = m.qkv(m.norm(x)).split(WIDTH, -1)
    return x + m.o(attention(q, k, v))


def _fused_per_head(m, x):
    q, k, v = m.qkv(m.norm(x)).view(2, 8, 4, 3, 4).unbind(3)
    return x + m.o(attention(q.flatten(-2), k.flatten(-2), v.flatten(-2)))


def _fused_grouped(m, x):
    heads = m.qkv(m.norm(x)).view(2, 8, 2, 4, 4)  # two queries, key, value in each group
    q, k, v = heads[..., :2, :].flatten(-3), heads[..., 2, :].flatten(-2), heads[..., 3, :].flatten(-2)
    return x + m.o(attention(q, k, v, 4, 2))


def _fused_by_index(m, x):
    heads = m.qkv(m.norm(x)).view(2, 8, 6, 4)
    q, k, v = heads[:, :, :-2], heads[:, :, [-2]], heads[:, :, [-1]]
    return x + m.o(attention(q.flatten(-2), k.flatten(-2), v.flatten(-2), 4, 1))


def _gated(m, x):
    h = m.norm(x)
    return x + m.down(F.silu(m.gate(h)) * m.up(h))


def _fused_gated(m, x):
    gate, up = m.gate_up(m.norm(x)).chunk(2, -1)
    return x + m.down(up * F.silu(gate))


def _interleaved_gated(m, x):
    h = m.gate_up(m.norm(x))
    return x + m.down(h[..., ::2] * torch.sigmoid(h[..., 1::2]))


def _mlp(act):
    return lambda m, x: x + m.fc2(act(m.fc1(m.norm(x))))


def _parallel(m, x):
    h = m.norm(x)
    return x + m.o(attention(m.q(h), m.k(h), m.v(h))) + m.down(F.silu(m.gate(h)) * m.up(h))


def _two_norms(m, x):
    a = m.norm1(x)
    return x + m.o(attention(m.q(a), m.k(a), m.v(a))) + m.down(F.gelu(m.up(m.norm2(x))))


def _experts(m, x):
    h = m.norm(x)
    weights, chosen = torch.topk(F.softmax(h @ m.router.t(), -1), 2)
    out = torch.zeros_like(h)
    for e in range(2):
        share = (weights * (chosen == e)).sum(-1, keepdim=True)
        out = out + share * m.down[e](F.silu(m.gate[e](h)) * m.up[e](h))
    return x + out + torch.sigmoid(m.shared_gate(h)) * m.shared_down(F.relu(m.shared_up(h)))


def _packed_experts(m, x):
    h = m.norm(x).view(1, 16, WIDTH)
    shares = F.softmax(h[0] @ m.router.t(), -1).t()[:, :, None]
    gate, up = torch.bmm(h.expand(3, 16, WIDTH), m.gate_up).chunk(2, -1)
    return x + (torch.bmm(F.silu(gate) * up, m.down) * shares).sum(0).view(2, 8, WIDTH)


def _gathered_experts(m, x):
    h = m.norm(x).view(16, 1, WIDTH)
    chosen = torch.topk(h[:, 0] @ m.router.t(), 1)[1][:, 0]
    gate, up = torch.bmm(h, m.gate_up[chosen]).chunk(2, -1)
    return x + torch.bmm(F.silu(gate) * up, m.down[chosen]).view(2, 8, WIDTH)


def _latent(m, x):
    h = m.norm(x)
    latent, rope = m.kv_a(h).split([12, 4], -1)
    k, v = m.kv_b(m.kv_norm(latent)).view(2, 8, 4, 8).split(4, -1)
    k = k + rope[:, :, None]
    return x + m.o(attention(m.q(h), k.flatten(-2), v.flatten(-2)))


def _output_gate(m, x):
    h = m.norm(x)
    return x + m.o(attention(m.q(h), m.k(h), m.v(h)) * torch.sigmoid(m.g(h)))


def _gated_norm(m, x):
    h = m.norm(x)
    return x + m.o(m.inner(m.v(h).cumsum(1)) * F.silu(m.z(h)))


def _sandwich(m, x):
    h = m.pre(x)
    return x + m.post(m.down(F.gelu(m.gate(h)) * m.up(h)))


def _post_norm(m, x):
    h = m.norm(x)
    return m.norm2(h + m.down(F.silu(m.gate(h)) * m.up(h)))


def _qk_norm(m, x):
    h = m.norm(x)
    return x + m.o(attention(m.qn(m.q(h)), m.kn(m.k(h)), m.v(h)))


def _v_norm(m, x):
    h = m.norm(x)
    return x + m.o(attention(m.q(h), m.k(h), F.layer_norm(m.v(h), (WIDTH,))))


def _cross(m, x):
    memory, h = m.encoder_norm(x), m.norm(x)
    return x + m.o(attention(m.q(h), m.k(memory), m.v(memory)))


def _looped(m, x):
    for _ in range(2):
        x = x + m.down(F.silu(m.gate(m.norm(x))) * m.up(m.norm(x)))
    return x


def _head(m, x):
    return m.head(m.norm(x) * 3.5)


def _parts(names, *more):
    parts = {name: linear() for name in names.split()}
    return parts | {key: value for pair in more for key, value in pair.items()}


N = {"norm": RMSNorm()}
QKVO = {frozenset("qkv"): "fold", frozenset("o"): "fold"}
GATED = {frozenset({"gate", "up"}): "fold", frozenset({"down"}): "fold"}

CASES = {
    "qkv": (_qkv, _parts("q k v o", N), QKVO),
    "grouped queries": (_gqa, _parts("q o", N, {"k": linear(16, 8), "v": linear(16, 8)}), QKVO),
    "fused blocks": (_fused_blocks, _parts("o", N, {"qkv": linear(16, 48, True)}),
                     {frozenset({"qkv"}): "fold", frozenset("o"): "fold"}),
    "fused per head": (_fused_per_head, _parts("o", N, {"qkv": linear(16, 48, True)}),
                       {frozenset({"qkv"}): "fold", frozenset("o"): "fold"}),
    "fused grouped": (_fused_grouped, _parts("o", N, {"qkv": linear(16, 32)}),
                      {frozenset({"qkv"}): "fold", frozenset("o"): "fold"}),
    "fused by index": (_fused_by_index, _parts("o", N, {"qkv": linear(16, 24)}),
                       {frozenset({"qkv"}): "fold", frozenset("o"): "fold"}),
    "gated": (_gated, _parts("gate up down", N), GATED),
    "fused gated": (_fused_gated, _parts("down", N, {"gate_up": linear(16, 32)}),
                    {frozenset({"gate_up"}): "fold", frozenset({"down"}): "fold"}),
    "interleaved gated": (_interleaved_gated, _parts("down", N, {"gate_up": linear(16, 32)}),
                          {frozenset({"gate_up"}): "fold", frozenset({"down"}): "fold"}),
    "relu": (_mlp(F.relu), _parts("fc1 fc2", N), {frozenset({"fc1"}): "fold", frozenset({"fc2"}): "fold"}),
    "squared relu": (_mlp(lambda x: F.relu(x) ** 2), _parts("fc2", N, {"fc1": linear(bias=True)}),
                     {frozenset({"fc1"}): "fold", frozenset({"fc2"}): "fold"}),
    "leaky relu": (_mlp(F.leaky_relu), _parts("fc1 fc2", N), {frozenset({"fc1"}): "fold", frozenset({"fc2"}): "fold"}),
    "gelu": (_mlp(F.gelu), _parts("fc1 fc2", N), {frozenset({"fc1"}): "fold", frozenset({"fc2"}): "run-time"}),
    "parallel": (_parallel, _parts("q k v o gate up down", N), {
        frozenset({"q", "k", "v", "gate", "up"}): "fold", frozenset("o"): "fold", frozenset({"down"}): "fold"}),
    "two norms": (_two_norms, _parts("q k v o up down", {"norm1": RMSNorm(), "norm2": RMSNorm()}),
                  QKVO | {frozenset({"up"}): "fold", frozenset({"down"}): "run-time"}),
    "latent": (_latent, _parts("q o kv_a", N, {"kv_norm": RMSNorm(12), "kv_b": linear(12, 32)}),
               {frozenset({"q", "kv_a"}): "fold", frozenset({"kv_b"}): "fold", frozenset("o"): "fold"}),
    "output gate": (_output_gate, _parts("q k v o g", N), {frozenset("qkvg"): "fold", frozenset("o"): "fold"}),
    "gated norm": (_gated_norm, _parts("v o z", N, {"inner": RMSNorm()}),
                   {frozenset("vz"): "fold", frozenset("o"): "fold"}),
    "sandwich": (_sandwich, _parts("gate up down", {"pre": RMSNorm(), "post": RMSNorm()}), GATED),
    "post-norm": (_post_norm, _parts("gate up down", N, {"norm2": RMSNorm()}),
                  {frozenset({"gate", "up"}): "run-time", frozenset({"down"}): "fold"}),
    "norms on q and k": (_qk_norm, _parts("q k v o", N, {"qn": RMSNorm(), "kn": RMSNorm()}), QKVO),
    "norm on v": (_v_norm, _parts("q k v o", N), {frozenset("qkv"): "fold", frozenset("o"): "run-time"}),
    "layer norm": (_gated, _parts("gate up down", {"norm": nn.LayerNorm(16)}), GATED),
    "1 + w": (_gated, _parts("gate up down", {"norm": RMSNorm(offset=1.0)}), GATED),
    "cross-attention": (_cross, _parts("q k v o", N, {"encoder_norm": RMSNorm()}),
                        {frozenset("q"): "fold", frozenset("kv"): "fold", frozenset("o"): "fold"}),
    "looped": (_looped, _parts("gate up down", N), GATED),
    "head behind a multiplier": (_head, _parts("head", N), {frozenset({"head"}): "fold"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_structures(case):
    run, parts, expected = CASES[case]
    assert kinds(Model(run, **parts)) == expected


def test_a_router_and_every_expert_scale_against_the_norm():
    parts = {name: nn.ModuleList([linear(), linear()]) for name in ("gate", "up", "down")}
    shared = {"shared_up": linear(), "shared_down": linear(), "shared_gate": linear(16, 1)}
    found = kinds(Model(_experts, norm=RMSNorm(), router=nn.Parameter(torch.randn(2, 16)), **parts, **shared))
    readers = {"router", "gate.0", "gate.1", "up.0", "up.1", "shared_up", "shared_gate"}
    assert found == {
        frozenset(readers): "fold",
        frozenset({"down.0"}): "fold",
        frozenset({"down.1"}): "fold",
        frozenset({"shared_down"}): "fold",
    }


@pytest.mark.parametrize("run", [_packed_experts, _gathered_experts])
def test_packed_experts(run):
    stacks = {"gate_up": nn.Parameter(torch.randn(3, 16, 16)), "down": nn.Parameter(torch.randn(3, 8, 16))}
    found = groups_of(Model(run, norm=RMSNorm(), router=nn.Parameter(torch.randn(3, 16)), **stacks))
    assert [(group.kind, set(group.names)) for group in found] == [
        ("fold", {"router", "gate_up"}),
        ("fold", {"down"}),
    ]
    producer = found[1].producer[0]
    assert (producer.name, producer.axis, producer.channel[:8].tolist()) == ("gate_up", -1, [-1] * 8)


def test_value_heads_that_are_shared_have_one_scale():
    run, parts, _ = CASES["grouped queries"]
    group = next(group for group in groups_of(Model(run, **parts)) if group.names == ("o.weight",))
    assert group.channels == 8
    assert group.consumers[0].channel.view(2, 2, 4)[:, 0].equal(group.consumers[0].channel.view(2, 2, 4)[:, 1])


def test_only_the_value_rows_of_a_fused_projection_scale():
    run, parts, _ = CASES["fused per head"]
    group = next(group for group in groups_of(Model(run, **parts)) if group.names == ("o.weight",))
    for entry in group.producer:
        rows = (entry.channel >= 0).view(4, 3, 4)
        assert rows[:, 2].all() and not rows[:, :2].any()


def test_a_squared_activation_takes_the_root_of_the_scale():
    run, parts, _ = CASES["squared relu"]
    group = next(group for group in groups_of(Model(run, **parts)) if group.names == ("fc2.weight",))
    assert {entry.power for entry in group.producer} == {-0.5}
    assert group.structure == "linear rows -> linear"


def test_an_offset_is_read_from_the_graph():
    run, parts, _ = CASES["1 + w"]
    assert groups_of(Model(run, **parts))[0].producer[0].offset == 1.0


def test_reasons_name_what_is_in_the_way():
    reasons = {}
    for case in ("gelu", "post-norm", "norm on v"):
        run, parts, _ = CASES[case]
        reasons[case] = next(group.reason for group in groups_of(Model(run, **parts)) if group.kind == "run-time")
    assert reasons["gelu"] == "passes through gelu, which is not positively homogeneous"
    assert "residual" in reasons["post-norm"]
    assert "normalised again" in reasons["norm on v"]


def test_a_padding_mask_does_not_stand_in_the_way():
    def run(m, x):
        return x + m.fc2(F.relu(m.fc1(m.norm(x).masked_fill(x[..., :1] > 0, 0.0) * (x[..., 1:2] > 0))))

    assert kinds(Model(run, **_parts("fc1 fc2", N))) == CASES["relu"][2]


def test_a_convolution_over_time_channel_by_channel_keeps_a_scale():
    def run(m, x):
        return x + m.out(m.conv(m.v(m.norm(x)).transpose(1, 2))[..., :8].transpose(1, 2))

    conv = nn.Conv1d(16, 16, 3, padding=2, groups=16)
    found = groups_of(Model(run, **_parts("v out", N), conv=conv))
    assert [(group.kind, group.names) for group in found] == [("fold", ("v.weight",)), ("fold", ("out.weight",))]


def test_graph_breaks_keep_the_groups_that_stay_inside_a_graph():
    def run(m, x):
        x = x + m.fc2(F.relu(m.fc1(m.norm(x))))
        torch._dynamo.graph_break()
        h = m.norm2(x)
        torch._dynamo.graph_break()
        return m.fc3(h)

    found = kinds(Model(run, **_parts("fc1 fc2 fc3", N, {"norm2": RMSNorm()})))
    assert found == CASES["relu"][2] | {frozenset({"fc3"}): "run-time"}


def test_control_flow_that_depends_on_data():
    def run(m, x):
        h = m.norm(x)
        return m.fc1(h) if x.sum() > 0 else m.fc2(h)

    assert set(kinds(Model(run, **_parts("fc1 fc2", N))).values()) == {"run-time"}


def test_models_on_the_meta_device_have_the_same_groups():
    from ptqc.capture import capture
    from ptqc.passes.groups.find import find_groups
    from ptqc.program import program

    run, parts, expected = CASES["parallel"]
    model = Model(run, **parts).to("meta").eval()
    batch = {"x": torch.empty(2, 8, 16, device="meta")}
    graphs = capture(model, batch, is_run=False)
    found = find_groups([program(graphs[0], model, batch)])
    assert {frozenset(name.removesuffix(".weight") for name in group.names): group.kind for group in found} == expected


def test_a_reciprocal_turns_the_scale_around():
    def run(m, x):
        return x + m.fc2(m.fc1(m.norm(x)).abs().reciprocal())

    found = groups_of(Model(run, **_parts("fc1 fc2", N)))
    assert [group.kind for group in found] == ["fold", "fold"]
    assert (found[1].producer[0].power, found[1].consumers[0].power) == (1.0, 1.0)


def test_a_form_of_an_operator_that_is_not_known_is_a_reason_and_no_error():
    def run(m, x):
        return x + m.fc2(F.relu(m.fc1(m.norm(x))).view(torch.int32).view(torch.float32))

    found = groups_of(Model(run, **_parts("fc1 fc2", N)))
    assert [group.kind for group in found] == ["fold", "run-time"]
    assert found[1].reason == "passes through a form of view that is not known"
