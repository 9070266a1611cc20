"""`torch.compile(model, backend="ptqc")`: agreement, caching, freeing, sharing of frames, training."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import ptqc.api as api
from ptqc.backend import kept_weights, stored_weights
from ptqc.errors import PtqcError
from ptqc.methods import METHODS
from ptqc.qtensor import QuantTensor
from tests.surrounded import KINDS, surrounded


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 96), nn.Linear(96, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


OPTIONS = {"method": "rtn", "bits": 4, "group_size": 32, "exact": True}
EXACT = {"exact": True}


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def eager(model, stored):
    twin = copy.deepcopy(model)
    for name, weight in stored.items():
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
    return twin


def agree(a, b, tolerance=1e-5):
    return bool((a - b).norm() / b.norm() < tolerance)


def test_a_float_model_is_quantized_once_and_agrees_with_eager(monkeypatch):
    calls = []
    rtn = METHODS.get("rtn")
    original = rtn.choose
    monkeypatch.setattr(rtn, "choose", lambda self, *a: calls.append(1) or original(self, *a))
    model = Stack().eval()
    compiled = torch.compile(model, backend="ptqc", options=OPTIONS)
    with torch.no_grad():
        for rows in (3, 5, 9):
            x = torch.randn(rows, 64)
            got = compiled(x)
            assert agree(got, eager(model, stored_weights(model))(x))
            assert not agree(got, model(x), 1e-3)
    assert len(calls) == len(stored_weights(model)) == 4
    assert set(stored_weights(model)) == {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")}
    assert {str(weight.spec) for weight in stored_weights(model).values()} == {"int4g32"}


def test_both_doors_make_the_same_codes():
    model, twin = Stack().eval(), None
    twin = api.quantize(copy.deepcopy(model), "rtn", bits=4, group_size=32, progress=False)
    with torch.no_grad():
        torch.compile(model, backend="ptqc", options=OPTIONS)(torch.randn(3, 64))
    for name, weight in stored_weights(model).items():
        assert torch.equal(weight, dict(twin.named_parameters())[name].data)


def test_attention_is_left_to_torch_where_it_is_asked_for(monkeypatch):
    graphs = []

    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    compile_fx = lambda module, inputs, **_: graphs.append(str(module.graph)) or module  # noqa: E731
    monkeypatch.setattr("ptqc.backend.compile_fx", compile_fx)
    x = torch.randn(1, 2, 3, 16)
    with torch.no_grad():
        for options in ({}, {"torch_attention": True}):
            torch._dynamo.reset()
            assert agree(torch.compile(Attention(), backend="ptqc", options=options)(x), Attention()(x))
    assert ["scaled_dot_product_attention" in graph for graph in graphs] == [False, True]


@pytest.mark.parametrize("is_special", [False, True])
def test_numbers_that_became_inputs_are_told(is_special, monkeypatch, caplog):
    class Scaled(nn.Module):
        factor = 0.3

        def forward(self, x):
            return x * self.factor

    monkeypatch.setattr("ptqc.backend.compile_fx", lambda module, inputs, **_: module)
    with torch._dynamo.config.patch(specialize_float=is_special), torch.no_grad():
        torch.compile(Scaled(), backend="ptqc", dynamic=True)(torch.ones(3))
    assert ("specialize_float" in caplog.text) is not is_special


def test_a_quantized_model_is_lowered():
    model = api.quantize(Stack().eval(), "rtn", progress=False)
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert agree(torch.compile(model, backend="ptqc", options=EXACT)(x), model(x))
        # By default activations are quantized in the kernels.
        assert agree(torch.compile(model, backend="ptqc")(x), model(x), 1.2e-2)


def test_two_models_of_one_class_do_not_mix():
    """Dynamo shares compiled frames among modules of one class."""
    models = [Block().eval(), Block().eval()]
    for options in (EXACT, OPTIONS):
        compiled = [torch.compile(model, backend="ptqc", options=options) for model in models]
        with torch.no_grad():
            for rows in (4, 7, 9):
                x = torch.randn(rows, 64)
                for model, run in zip(models, compiled, strict=True):
                    got = run(x)
                    assert agree(got, eager(model, stored_weights(model))(x))


def test_patterns_hold_for_the_second_model_of_a_class():
    first, second = Stack().eval(), Stack().eval()
    for model in (first, second):
        with torch.no_grad():
            torch.compile(model, backend="ptqc", options=OPTIONS | {"exclude": ["blocks.0", "down"]})(torch.ones(3, 64))
        assert set(stored_weights(model)) == {"blocks.1.up.weight"}


def test_freeing_survives_new_shapes_and_ends_eager_use():
    model = Stack().eval()
    expected_from = copy.deepcopy(model)
    compiled = torch.compile(model, backend="ptqc", options=OPTIONS | {"free": True})
    with torch.no_grad():
        for rows in (3, 5, 9):
            x = torch.randn(rows, 64)
            assert agree(compiled(x), eager(expected_from, stored_weights(model))(x))
    assert all(block.up.weight.untyped_storage().size() == 0 for block in model.blocks)
    assert model.blocks[0].up.bias.untyped_storage().size() > 0


def test_reasons_and_patterns():
    model = Stack().eval()
    with torch.no_grad():
        torch.compile(model, backend="ptqc", options=OPTIONS | {"exclude": ["blocks.0"]})(torch.randn(3, 64))
    assert set(stored_weights(model)) == {"blocks.1.up.weight", "blocks.1.down.weight"}
    assert kept_weights(model) == {"blocks.0.up.weight": "excluded", "blocks.0.down.weight": "excluded"}


@pytest.mark.parametrize("options", [{"bits": 4}, {"method": "rtn", "colour": 1}, {"method": "nope"}])
def test_bad_options_are_errors(options):
    with pytest.raises(Exception, match="known") as caught, torch.no_grad():
        torch.compile(Block(), backend="ptqc", options=options)(torch.randn(2, 64))
    assert isinstance(caught.value, PtqcError) or "PtqcError" in str(caught.value) or "ptqc" in repr(caught.value)


def test_gradients_through_a_compiled_quantized_model():
    model = api.quantize(Stack().eval(), "rtn", progress=False)
    grads = []
    for run in (model, torch.compile(model, backend="ptqc")):
        x = torch.linspace(-1, 1, 256).view(4, 64).requires_grad_()
        run(x).square().sum().backward()
        grads.append(x.grad)
    assert agree(*grads)


def test_the_output_head_of_a_transformers_model_stays(reference_model):
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        torch.compile(reference_model, backend="ptqc", options=OPTIONS)(input_ids=ids)
    assert "output head" in kept_weights(reference_model)["lm_head.weight"]
    assert len(stored_weights(reference_model)) == 28


def test_graph_breaks_are_reported(caplog):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x):
            x = self.first(x)
            if x.sum() > 0:
                x = -x
            return self.second(x)

    model, x = Broken().eval(), torch.randn(3, 64)
    with torch.no_grad():
        got = torch.compile(model, backend="ptqc", options=OPTIONS)(x)
        assert agree(got, eager(model, stored_weights(model))(x))
    assert "graph break" in caplog.text
    assert len(stored_weights(model)) == 4


def test_the_name_works_without_importing_ptqc():
    code = (
        "import sys, torch; m = torch.nn.Linear(64, 64).eval(); x = torch.randn(2, 64)\n"
        "assert 'ptqc' not in sys.modules and 'ptqc' in torch._dynamo.list_backends()\n"
        "with torch.no_grad(): y = torch.compile(m, backend='ptqc', options={'method': 'rtn', 'bits': 8})(x)\n"
        "print(float((y - m(x)).norm() / m(x).norm()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 0.02


def test_stored_weights_are_quant_tensors():
    model = Block().eval()
    with torch.no_grad():
        torch.compile(model, backend="ptqc", options=OPTIONS)(torch.randn(2, 64))
    assert all(isinstance(weight, QuantTensor) for weight in stored_weights(model).values())


class Fan(nn.Module):
    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(64, 96) for _ in KINDS)
        for linear, kind in zip(self.linears, KINDS, strict=True):
            linear.weight = nn.Parameter(surrounded(kind, (96, 64))[1], requires_grad=False)

    def forward(self, x):
        return torch.cat([linear(x) for linear in self.linears], -1)


@pytest.mark.slow
@pytest.mark.parametrize("needs_grad", [False, True])
def test_surrounded_weights_compile_to_what_they_are_in_eager(needs_grad):
    model, x = Fan(), torch.randn(2, 5, 64, requires_grad=needs_grad)
    eager = model(x)
    compiled = torch.compile(model, backend="ptqc", fullgraph=True, options={"exact": True})(x)
    assert (compiled - eager).norm() / eager.norm() < 1e-5
    if needs_grad:
        (towards_x,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (compiled, eager))
        assert (towards_x - expected).norm() / expected.norm() < 1e-5


def test_rotations_without_data_are_made_in_the_backend():
    layer, x = torch.nn.Linear(64, 48), torch.randn(5, 64)
    options = {"method": "hadamard+rtn", "bits": 8, "group_size": 32}
    with torch.no_grad():
        compiled = torch.compile(layer, backend="ptqc", options=options)(x)
        assert 0 < (compiled - layer(x)).norm() / layer(x).norm() < 0.02
    (stored,) = stored_weights(layer).values()
    assert stored.surroundings.input_rotation


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant+rtn"])
def test_what_needs_data_is_sent_to_quantize(method):
    compiled = torch.compile(torch.nn.Linear(64, 64), backend="ptqc", options={"method": method})
    with pytest.raises(Exception, match=r"needs calibration data, .* call ptqc.quantize\(model"):
        compiled(torch.ones(1, 64))
