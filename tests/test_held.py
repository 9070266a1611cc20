"""A compiled model holds every weight once, and nothing that could be done with the model before is lost."""

import copy
import gc
import io
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

import ptqc
from benchmarks.held import live_bytes, live_tensors
from ptqc import backend, ops
from ptqc.codegen.cpp.isa import running_isa
from ptqc.codegen.cpp.toolchain import compiler, missing_tools
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from tests.cpp._run import random_parts
from tests.export._models import small_model
from tests.export.test_gguf_tokenizer import byte_level

pytestmark = pytest.mark.skipif(
    isinstance(running_isa(), str) or missing_tools(compiler(), running_isa()) is not None, reason="no C++ compiler"
)
WIDTH = 512


class Layer(nn.Module):
    """Products that merge (q, k, v; gate, up), and some that do not."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=False) for n in (WIDTH, 128, 128))
        self.o, self.down = nn.Linear(WIDTH + 256, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.is_apart = False

    def forward(self, x):
        q, k, v = self.q(x), self.k(x * 1 if self.is_apart else x), self.v(-x if self.is_apart else x)
        x = self.o(torch.cat([q, k, v], -1))
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def model(spec="int4g32"):
    """Random weights of a spec."""
    torch.manual_seed(0)
    seeded, stored_as, net = torch.Generator().manual_seed(0), WeightSpec.parse(spec), Layer().eval()
    for linear in (module for module in net.modules() if isinstance(module, nn.Linear)):
        shape = tuple(linear.weight.shape)
        weight = QuantTensor(random_parts(stored_as, *shape, seeded), stored_as, shape, torch.float32)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return net


def weights(net):
    return {name: value for name, value in net.named_parameters() if isinstance(value, QuantTensor)}


def stored(net):
    """A copy of every stored tensor."""
    return {name: {part: tensor.clone() for part, tensor in w.tensors.items()} for name, w in weights(net).items()}


def same(net, parts):
    """True if every stored tensor has the bits that it had."""
    return all(
        torch.equal(tensor.view(torch.uint8), parts[name][part].view(torch.uint8))
        for name, weight in weights(net).items()
        for part, tensor in weight.tensors.items()
    )


def compiled(net, *inputs, **options):
    """The results of a compiled model, without derivatives."""
    run = torch.compile(net, backend="ptqc", options=options)
    with torch.no_grad():
        results = [run(x) for x in inputs]
    return results[0] if len(results) == 1 else results


def x_of(rows=3):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Graphs run as they are lowered: what Inductor makes of the rest has tests of its own."""
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "compile_fx", lambda module, inputs, config_patches=None: module)
    others = live_tensors()  # what earlier tests have left must not go while a test counts
    yield
    del others


@pytest.mark.parametrize(
    ("spec", "bound"),
    [
        ("int4g32", 1.1),
        pytest.param("nf4g64", 1.1, marks=pytest.mark.slow),
        pytest.param("int8", 1.1, marks=pytest.mark.slow),
        pytest.param("e8p", 2.1, marks=pytest.mark.slow),
    ],
)
def test_a_weight_is_held_once(spec, bound):
    """e8p: kernels read four bits for every two that are stored."""
    expected = compiled(model(spec), x_of(), keep_stored=True)
    torch._dynamo.reset()
    without = live_bytes()
    net = model(spec)
    before = live_bytes() - without
    got = compiled(net, x_of())
    after = live_bytes() - without
    assert after <= bound * before
    assert torch.equal(got, expected)
    assert all("codes" in weight.given_up for weight in weights(net).values())
    assert sum(weight.nbytes for weight in weights(net).values()) > 0.9 * before


def test_everything_comes_back():
    net = model()
    parts = stored(net)
    dense, eager = net.gate.weight.dequantize(), net(x_of())
    state = {name: value.clone() for name, value in net.state_dict().items()}
    compiled(net, x_of())
    assert same(net, parts)
    assert torch.equal(net.gate.weight.dequantize(), dense) and torch.equal(net(x_of()), eager)
    assert torch.equal(net.gate.weight.codes, parts["gate.weight"]["codes"])
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name])
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    assert all(torch.equal(value, state[name]) for name, value in torch.load(file).items())
    read = ptqc.unflatten_state_dict(*ptqc.flatten_state_dict(net.state_dict()))
    assert set(read) == set(state) and all(torch.equal(read[name], value) for name, value in state.items())
    assert "codes" in net.q.weight.given_up


def test_a_compiled_model_is_saved_and_exported(reference_model, tmp_path):
    net = ptqc.quantize(reference_model, "rtn", bits=4, group_size=32, progress=False)
    parts, ids = stored(net), torch.arange(4)[None]
    ptqc.save(net, tmp_path / "before")
    ptqc.export(net, "gptq", tmp_path / "before-gptq")
    with torch.no_grad():
        torch.compile(net, backend="ptqc")(input_ids=ids)
    assert all("codes" in weight.given_up for weight in weights(net).values())
    ptqc.save(net, tmp_path / "after")
    ptqc.export(net, "gptq", tmp_path / "after-gptq")
    for kind in ("", "-gptq"):
        files = [tmp_path / f"{when}{kind}" / "model.safetensors" for when in ("before", "after")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert same(ptqc.load(tmp_path / "after"), parts)


def test_a_state_dict_shares_what_the_model_holds():
    net = model()
    compiled(net, x_of())
    before = live_bytes()
    state = net.state_dict()
    assert live_bytes() == before and state["q.weight"].held is not None
    assert torch.equal(state["q.weight"].t().dequantize(), net.q.weight.dequantize().t())


def test_copies_stand_alone():
    net = model()
    parts = stored(net)
    got = compiled(net, x_of())
    before = live_bytes()
    twin = copy.deepcopy(net)
    assert same(twin, parts)
    torch._dynamo.reset()
    assert torch.equal(compiled(twin, x_of()), got)
    assert live_bytes() - before < 1.1 * sum(weight.nbytes for weight in weights(twin).values())
    twin.q.weight.data.copy_(twin.q.weight.clone())
    assert net.q.weight.held is not None and same(net, parts)


def test_a_compiled_model_can_be_moved_and_goes_on():
    net = model("nf4g64")
    parts = stored(net)
    got = compiled(net, x_of())
    for move in (lambda: net.to("cpu"), lambda: net.to(torch.bfloat16), lambda: net.to(torch.float64)):
        move()
    net.float()
    assert all(torch.equal(weight.codes, parts[name]["codes"]) for name, weight in weights(net).items())
    assert (compiled(net, x_of()) - got).norm() / got.norm() < 1e-2  # biases were rounded
    assert net.to("meta").q.weight.is_meta


def test_new_values_are_seen():
    net, other = model(), model()
    for weight in weights(other).values():
        weight.codes.bitwise_not_()
    expected = compiled(other, x_of())
    torch._dynamo.reset()
    run = torch.compile(net, backend="ptqc")
    with torch.no_grad():
        assert not torch.equal(run(x_of()), expected)
        net.load_state_dict(other.state_dict())
        assert torch.equal(run(x_of()), expected)


def test_training_after_inference():
    net = model()
    x = x_of().requires_grad_()
    (expected,) = torch.autograd.grad(net(x).square().sum(), x)
    parts, run = stored(net), torch.compile(net, backend="ptqc")
    with torch.no_grad():
        first = run(x)
    (got,) = torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(run(x), first)
    assert same(net, parts)


@pytest.mark.parametrize("apart_first", [False, True])
def test_graphs_that_merge_and_graphs_that_do_not_share(apart_first):
    """q, k and v read one value in one graph and three in the other."""
    net, expected = model(), {}
    for is_apart in (False, True):
        torch._dynamo.reset()
        net.is_apart = is_apart
        expected[is_apart] = compiled(net, x_of(), keep_stored=True)
    torch._dynamo.reset()
    gc.collect()
    net = model()
    before = live_bytes()
    run = torch.compile(net, backend="ptqc")
    size = sum(weight.nbytes for weight in weights(net).values())
    for is_apart in (apart_first, not apart_first, apart_first):
        net.is_apart = is_apart
        with torch.no_grad():
            assert torch.equal(run(x_of()), expected[is_apart])
    assert live_bytes() - before <= 0.1 * size
    assert same(net, stored(model()))
    kernels = {chosen.names for chosen in backend.chosen_kernels(net)}
    assert any(len(names) == 3 for names in kernels) and any("k" in names[0] and len(names) == 1 for names in kernels)


def test_no_recompile_once_parts_are_gone():
    net = model()
    run = torch.compile(net, backend="ptqc")
    with torch.no_grad():
        first = run(x_of())
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(run(x_of()), first)


def test_other_compilers_make_parts_in_their_graphs():
    net = model()
    eager = net(x_of())
    other = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(other(x_of()), eager)
        compiled(net, x_of())
        assert torch.equal(other(x_of()), eager)
    assert "codes" in net.q.weight.given_up


def test_weights_can_keep_what_is_stored():
    net = model()
    compiled(net, x_of(), keep_stored=True)
    assert all(weight.held is None for weight in weights(net).values())


def test_inference_mode():
    net = model()
    parts, eager = stored(net), net(x_of())
    run = torch.compile(net, backend="ptqc")
    with torch.inference_mode():
        first = run(x_of())
    assert "codes" in net.q.weight.given_up and same(net, parts)
    with torch.no_grad():
        assert torch.equal(run(x_of()), first)
    x = x_of().requires_grad_()
    net(x).sum().backward()
    assert x.grad is not None and torch.equal(net(x_of()), eager)


def test_exporting_puts_the_codes_of_a_weight_in_order_once(tmp_path, monkeypatch):
    model = small_model("Llama", vocab_size=700, num_hidden_layers=1)
    ptqc.quantize(model, "rtn", spec="int4g32", progress=False)
    ptqc.export(model, "gguf", tmp_path / "before.gguf", quant="Q4_0", tokenizer=byte_level())
    compiled(model, torch.arange(8)[None])
    restored = Counter()

    def counting(prepared, order, part, *rows):
        restored[prepared[0].data_ptr(), order, part] += 1
        return restore(prepared, order, part, *rows)

    restore = ops.restore
    monkeypatch.setattr(ops, "restore", counting)
    ptqc.export(model, "gguf", tmp_path / "after.gguf", quant="Q4_0", tokenizer=byte_level())
    assert {count for (*_, part), count in restored.items() if part == "codes"} == {1}
    assert (tmp_path / "after.gguf").read_bytes() == (tmp_path / "before.gguf").read_bytes()


@pytest.mark.parametrize("rows", [slice(37, 50), slice(-5, None), slice(0, 16)])
def test_slices_of_rows_are_restored_alone(rows, monkeypatch):
    net = model("int4g32z")
    whole = {name: weight.dequantize() for name, weight in weights(net).items()}
    compiled(net, x_of())
    asked, restore = [], ops.restore

    def noted(prepared, order, part, first=0, count=None):
        asked.append((part, first, count))
        return restore(prepared, order, part, first, count)

    monkeypatch.setattr(ops, "restore", noted)
    for name in ("o", "gate", "v"):
        asked.clear()
        weight = getattr(net, name).weight
        piece = weight[rows]
        wanted = range(*rows.indices(len(weight)))
        assert asked == [(part, wanted.start, len(wanted)) for part in weight.given_up]
        assert isinstance(piece, QuantTensor) and torch.equal(piece.dequantize(), whole[f"{name}.weight"][rows])
    assert "codes" in net.o.weight.given_up
