"""QuantTensor in the places where a float weight would stand."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptqc import storage
from ptqc.errors import PtqcError
from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from ptqc.storage import Codes
from ptqc.surroundings import Surroundings, apply, steps_before, steps_undoing
from tests.surrounded import KINDS, surrounded


def stored(shape, name="int4g32", is_transposed=False, dtype=torch.float32):
    weight = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return quantize_weight(weight, METHODS.get("rtn")(), WeightSpec.parse(name), is_transposed=is_transposed)


def parameter(*args, **kwargs):
    return nn.Parameter(stored(*args, **kwargs), requires_grad=False)


class Everything(nn.Module):
    """Every way in which models multiply with weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.linear, self.plain = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.conv1d = Conv1D(64, 64)
        self.experts = nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.plain(torch.relu(self.linear(x)))
        x = self.conv1d(x)
        each = x.flatten(0, 1).expand(4, -1, -1)
        batched = torch.bmm(each, self.experts.transpose(1, 2)).sum(0).view(x.shape)
        chosen = torch.einsum("bti,eoi->bto", x, self.experts[torch.tensor([0, 2])])
        first = x @ self.experts[1].t()
        halves = [x @ half.mT for half in self.linear.weight[:64].chunk(2)]
        return batched + chosen + first + torch.cat(halves, -1) + x @ (self.plain.weight * 0.5)[:, :64]


@pytest.fixture
def models():
    """The same model with stored weights, and with the numbers they stand for."""
    torch.manual_seed(0)
    model = Everything().eval()
    model.linear.weight, model.plain.weight = parameter((96, 64)), parameter((64, 96), "nf4g32dq")
    model.embed.weight, model.experts = parameter((50, 64), "int8"), parameter((4, 64, 64), "int3g32z")
    model.conv1d.weight = parameter((64, 64), "int5g32f", is_transposed=True)
    plain = copy.deepcopy(model)
    for name, weight in list(plain.named_parameters()):
        if isinstance(weight, QuantTensor):
            owner, _, attribute = name.rpartition(".")
            dense = nn.Parameter(weight.dequantize().clone(), requires_grad=False)
            setattr(plain.get_submodule(owner), attribute, dense)
    assert not any(isinstance(weight, QuantTensor) for weight in plain.parameters())
    return model, plain


IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def close(a, b, tolerance=1e-5):
    return bool((a - b).norm() / b.norm() < tolerance)


def test_eager(models):
    model, plain = models
    assert close(model(IDS), plain(IDS))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(models, mode):
    model, plain = models
    with mode():
        assert close(model(IDS), plain(IDS))


def test_compile_in_one_graph(models):
    model, plain = models
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(compiled(IDS), plain(IDS))


@pytest.mark.slow
def test_compile_with_inductor_and_new_shapes(models):
    model, plain = models
    compiled = torch.compile(model, fullgraph=True)
    for ids in (IDS, IDS[:, :3], IDS[:1]):
        assert close(compiled(ids), plain(ids))


def test_export_keeps_the_operators(models):
    model, plain = models
    program = torch.export.export(model, (IDS,)).run_decompositions()
    assert close(program.module()(IDS), plain(IDS))
    assert {"ptqc.linear.default", "ptqc.bmm.default", "ptqc.embedding.default"} <= {
        str(node.target) for node in program.graph.nodes
    }


def test_state_dict_round_trip(models):
    model, _ = models
    other = copy.deepcopy(model)
    for part in other.linear.weight.parts.values():
        part.zero_()
    assert not close(other(IDS), model(IDS))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS), model(IDS))
    third = Everything().eval()
    third.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(third(IDS), model(IDS))


def test_loading_floats_into_it_is_refused(models):
    model, plain = models
    with pytest.raises((PtqcError, RuntimeError), match="one spec and shape"):
        model.load_state_dict(plain.state_dict())


def test_deepcopy_and_clone_own_their_parts(models):
    model, _ = models
    twin, weight = copy.deepcopy(model), model.linear.weight
    twin.linear.weight.codes.zero_()
    assert weight.codes.any()
    assert torch.equal(weight.clone(), weight.data)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype_changes_what_it_pretends_to_be(models, dtype):
    model, plain = models
    moved = copy.deepcopy(model).to(dtype)
    assert moved.linear.weight.dtype == dtype
    assert torch.equal(moved.linear.weight.codes, model.linear.weight.codes)
    assert moved.linear.weight.scale.dtype == torch.float16
    assert close(moved(IDS).float(), plain(IDS).float(), 3e-2)


def test_to_device_moves_the_parts():
    weight = stored((32, 64)).to("meta")
    assert weight.device.type == weight.codes.device.type == weight.scale.device.type == "meta"
    assert weight.dequantize().shape == (32, 64)


def test_torch_save_and_load_with_weights_only(models):
    model, _ = models
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded["conv1d.weight"], model.conv1d.weight.data)
    assert loaded["conv1d.weight"].is_transposed
    assert isinstance(pickle.loads(pickle.dumps(model.experts.data)), QuantTensor)
    assert b"cptqc.qtensor\n_rebuild\n" in pickle.dumps(model.experts.data, protocol=2)  # as in files there are


def test_gradient_reaches_the_activation(models):
    model, plain = models
    grads = []
    for each in (model, plain):
        x = torch.ones(3, 64, requires_grad=True)
        each.plain(torch.relu(each.linear(x))).sum().backward()
        grads.append(x.grad)
    assert close(*grads)


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 64), "head": nn.Linear(64, 50, bias=False)})
    model["embed"].weight = model["head"].weight = parameter((50, 64))
    assert len(list(model.parameters())) == 1
    moved = copy.deepcopy(model).bfloat16()
    assert moved["embed"].weight is moved["head"].weight
    assert moved["head"](moved["embed"](IDS)).shape == (2, 4, 50)


@pytest.mark.parametrize("change", [lambda w: w.mul_(2), lambda w: w.zero_(), nn.init.normal_, lambda w: w.add_(w)])
def test_changing_in_place_is_an_error(change):
    with pytest.raises(PtqcError, match="dequantize"), torch.no_grad():
        change(parameter((32, 64)))


def test_mixed_types_are_refused_as_for_floats():
    with pytest.raises(RuntimeError, match="dtype"):
        nn.functional.linear(torch.ones(2, 64, dtype=torch.float16), stored((32, 64)))


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w + 1,
        lambda w: w.abs().sum(),
        lambda w: w.float().pow(2).mean(0),
        lambda w: w[3:7],
        lambda w: w[5],
        lambda w: w[:, 2:9],
        lambda w: w.T.contiguous(),
        lambda w: w.reshape(-1),
        lambda w: torch.cat([w, w]),
        lambda w: w.flip(0),
        lambda w: torch.linalg.norm(w, dim=1),
        lambda w: nn.functional.normalize(w),
        lambda w: torch.zeros_like(w),
        lambda w: w @ w.T,
        lambda w: w.mT @ w,
        lambda w: w.to(torch.int32),
    ],
)
def test_everything_else_equals_the_dequantized_tensor(function):
    weight = stored((32, 64))
    expected, got = function(weight.dequantize()), function(weight)
    got = got.dequantize() if isinstance(got, QuantTensor) else got
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_selecting_experts_stays_quantized():
    stack = stored((4, 32, 64))
    for piece in (stack[2], stack[1:3], stack[torch.tensor([3, 0])], *stack.unbind(0), *stack.split(2)):
        assert isinstance(piece, QuantTensor)
    assert torch.equal(stack[torch.tensor([3, 0])].dequantize(), stack.dequantize()[[3, 0]])


def test_repr_and_size():
    weight = stored((32, 64))
    assert repr(weight) == "QuantTensor(int4g32, shape=(32, 64), dtype=torch.float32, device=cpu)"
    assert weight.nbytes == weight.spec.nbytes((32, 64)) == 32 * 32 + 32 * 2 * 2


@pytest.mark.slow
def test_lora_on_top_trains_and_leaves_the_base_alone(reference_model):
    """Adapters of PEFT over a stored base: the loss falls, the base stays bit-identical."""
    from peft import LoraConfig, get_peft_model

    import ptqc.api

    model = ptqc.api.quantize(reference_model, "rtn", spec="nf4g64", progress=False)
    base = {n: w.clone() for n, w in model.state_dict().items() if isinstance(w, QuantTensor)}
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    ids = torch.randint(0, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(50):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    after = {n.replace("base_model.model.", "").replace(".base_layer", ""): w for n, w in tuned.state_dict().items()}
    assert len(base) == 28
    assert all(torch.equal(after[n], w) for n, w in base.items())


# -------------------------------------------------------------------- surroundings


def reference(x, stored, matrix):
    """x @ W.T with the numbers of W; what is done to inputs comes from the equation alone."""
    act = stored.surroundings.act
    if act.dtype is None:
        return x @ matrix.mT
    around = replace(stored.surroundings, output_rotation=None)
    seen = apply(steps_before(around, stored.extras, x.dtype), x)
    undone = apply(steps_undoing(replace(around, input_scale=False), stored.extras), seen)
    return (undone / stored.extras.get("input_scale", 1)) @ matrix.mT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_products_run_what_stands_around(kind, mode, seeded):
    x, bias = torch.randn(3, 5, 64, generator=seeded), torch.randn(96, generator=seeded)
    weight, q = surrounded(kind, (96, 64))
    turned, (_, stack) = surrounded(kind, (96, 64), is_transposed=True)[1], surrounded(kind, (2, 96, 64))
    assert close(q.dequantize(), weight, 0.02)
    assert close(turned.dequantize().t(), weight, 0.02)
    expected = reference(x, q, q.dequantize())
    with mode():
        assert close(nn.functional.linear(x, q, bias), expected + bias)
        assert close(x @ q.t(), expected)
        assert close(torch.addmm(bias, x[0], turned), reference(x[0], q, q.dequantize()) + bias)
        assert close(torch.bmm(x[:2], stack.mT), reference(x[:2], stack, stack.dequantize()))


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_keep_what_stands_around(kind):
    _, stack = surrounded(kind, (3, 96, 64))
    whole = stack.dequantize()
    pairs = [
        (stack[1], whole[1]),
        (stack[1:], whole[1:]),
        (stack[torch.tensor([2, 0])], whole[torch.tensor([2, 0])]),
        (stack.unbind(0)[2], whole[2]),
        (stack[0][:32], whole[0][:32]),
        (stack[2][:, :32], whole[2][:, :32]),
        (nn.functional.embedding(torch.tensor([3, 95]), stack[0]), whole[0][torch.tensor([3, 95])]),
    ]
    for piece, expected in pairs:
        piece = piece.dequantize() if isinstance(piece, QuantTensor) else piece
        torch.testing.assert_close(piece, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(stack[1], QuantTensor)
    assert stack[1].surroundings == stack.surroundings


@pytest.mark.parametrize("kind", ["static", "everything"])
def test_copies_carry_what_stands_around(kind):
    _, q = surrounded(kind, (96, 64))
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    copies = [
        torch.load(file, weights_only=True),
        pickle.loads(pickle.dumps(q)),
        copy.deepcopy(q),
        q.clone(),
        q.t().t(),
    ]
    for twin in copies:
        assert torch.equal(twin, q)
        assert twin.surroundings == q.surroundings
        assert all(torch.equal(extra, q.extras[name]) for name, extra in twin.extras.items())
    half = q.to(torch.float16)
    assert half.dtype == torch.float16
    assert half.tensors.keys() == q.tensors.keys()
    assert all(tensor.dtype == q.tensors[name].dtype for name, tensor in half.tensors.items())
    assert nn.functional.linear(torch.ones(2, 64, dtype=torch.float16), half).dtype == torch.float16
    assert q.nbytes == sum(t.numel() * t.element_size() for t in [*q.parts.values(), *q.extras.values()])
    assert "surroundings={" in repr(q)
    target = q.clone()
    for tensor in target.tensors.values():
        tensor.zero_()
    assert torch.equal(target.copy_(q), q)
    with pytest.raises(PtqcError, match="one spec and shape"):
        target.copy_(surrounded("order", (96, 64))[1])


@pytest.mark.parametrize("kind", ["outliers", "everything"])
def test_surrounded_weights_compile_and_train(kind, seeded):
    _, q = surrounded(kind, (96, 64))
    linear = nn.Linear(64, 96)
    linear.weight = nn.Parameter(q, requires_grad=False)
    x = torch.randn(5, 64, generator=seeded, requires_grad=True)
    grad = torch.randn(5, 96, generator=seeded)
    eager = linear(x)
    eager.backward(grad)
    assert close(x.grad, grad @ q.dequantize())  # quantizing the input is straight through
    torch._dynamo.reset()
    assert close(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), eager)


def test_an_order_on_top_of_an_order():
    logical = Codes(
        torch.arange(8, dtype=torch.uint8).expand(2, 8) + 124, torch.ones(2, 1), order=torch.arange(8).flip(0)
    )
    outer = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    q = QuantTensor.from_codes(logical, WeightSpec.parse("int8"), torch.float32)
    assert q.extras["order"].dtype == torch.int32
    assert q.dequantize()[0].tolist() == list(range(3, -5, -1))
    twice = QuantTensor.from_codes(
        logical, WeightSpec.parse("int8"), torch.float32, False, Surroundings(order=True), {"order": outer.int()}
    )
    assert torch.equal(twice.dequantize(), q.dequantize()[:, outer])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_sorted_by_expert_read_the_experts_that_have_rows(is_transposed, monkeypatch):
    import transformers.integrations.moe  # noqa: F401 - the operator

    weight = stored((4, 64, 96) if is_transposed else (4, 96, 64), is_transposed=is_transposed)
    x, offsets = torch.randn(7, 64), torch.tensor([3, 3, 6, 6], dtype=torch.int32)
    view = weight if is_transposed else weight.transpose(-2, -1)
    expected = torch.ops.transformers.grouped_mm_fallback(x, view.dequantize(), offsets)
    shapes = []
    plain = storage.decode
    monkeypatch.setattr(storage, "decode", lambda parts, spec, shape, dtype: (
        shapes.append(tuple(shape)), plain(parts, spec, shape, dtype))[1])  # fmt: skip
    for product in (torch.ops.transformers.grouped_mm_fallback, torch._grouped_mm):
        found = product(x, view, offs=offsets)
        assert close(found[:6], expected[:6]) and (found[6] == 0).all()
    assert shapes == [(96, 64)] * 4
