import pytest
import torch
from torch import nn

from ptqc.capture import capture
from ptqc.engine.pieces import cut, span_of
from ptqc.groups import ScaledParameter, ScaleGroup
from ptqc.program import program
from tests.tiny import IDS, tiny


class Chain(nn.Module):
    """Linears of falling width with nothing beside them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size // 2) for size in (64, 32, 16))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


class Twice(nn.Module):
    """One weight used at both ends."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.first(torch.relu(self.middle(torch.relu(self.first(x))))), x


def made(model, batch):
    (graph,) = capture(model, batch, is_run=False)
    return program(graph, model, batch)


def batch_of(model):
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})


def run(division, parameters, batch):
    values, results = {}, {}
    for piece in division.pieces:
        assert set(piece.takes) <= set(values)
        gave, more = piece.run_with_results(values, parameters, batch)
        assert piece.run(values, parameters, batch).keys() == gave.keys() == set(piece.gives)
        values, results = values | gave, results | more
    return [results[place] for place in range(len(results))]


def assert_equal_to_the_whole(model, batch, whole, division):
    with torch.no_grad():
        expected = whole.module(*whole.arguments(batch))
        found = run(division, dict(model.named_parameters()), batch)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "count"), [("plain", 9), ("tied", 9), ("transposed", 9), ("experts", 11), ("mixed", 21)]
)
def test_pieces_one_after_another_are_the_program(name, count):
    model = tiny(name)
    batch = batch_of(model)
    whole = made(model, batch)
    division = cut(whole)
    assert len(division.pieces) == count
    assert_equal_to_the_whole(model, batch, whole, division)


def test_a_llama_is_cut_wherever_a_product_waits_for_all_before_it_and_after_every_residual_add():
    model = tiny("plain")
    division = cut(made(model, batch_of(model)))
    linears = [{name.split(".")[-2] for name in piece.parameters if "_proj" in name} for piece in division.pieces]
    attention, mlp = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}], [{"gate_proj", "up_proj"}, {"down_proj"}]
    assert linears == [*attention, *mlp] * 2 + [set()]
    for piece in division.pieces[1:-1:2]:
        (carried,) = [name for name in piece.gives if name.startswith("add")]
        ((output,),) = [piece.program.graph.find_nodes(op="output")]
        node = output.args[0][piece.gives.index(carried)]
        assert node.target is torch.ops.aten.add.Tensor
        assert node.meta["val"].shape == (1, 16, 64)


def test_the_states_of_an_encoder_are_carried_through_the_decoder():
    model = tiny("mixed")
    division = cut(made(model, batch_of(model)))
    (states,) = [name for name in division.pieces[10].takes if name in division.pieces[16].takes and "mul" in name]
    assert states in division.pieces[8].gives
    assert division.shared == {"shared.weight": (0, 8, 20)}


def test_a_chain_is_cut_at_every_linear():
    model, batch = Chain(), {"x": torch.randn(3, 64)}
    whole = made(model, batch)
    division = cut(whole)
    expected = [{f"layers.{n}.bias", f"layers.{n}.weight"} for n in range(3)]
    assert [set(piece.parameters) for piece in division.pieces] == expected
    assert_equal_to_the_whole(model, batch, whole, division)


def test_a_weight_used_twice_is_in_both_pieces():
    model, batch = Twice(), {"x": torch.randn(3, 16)}
    whole = made(model, batch)
    division = cut(whole)
    assert division.shared == {"first.weight": (0, 2), "first.bias": (0, 2)}
    assert_equal_to_the_whole(model, batch, whole, division)


def group(producer, consumer):
    entry = [ScaledParameter(name, -1, torch.arange(16), power) for name, power in ((producer, -1.0), (consumer, 1.0))]
    return ScaleGroup("value", 16, "fold", (entry[0],), (entry[1],))


def test_no_cut_falls_into_a_span():
    model = tiny("plain")
    whole = made(model, batch_of(model))
    layer = "model.layers.{}.{}.weight"
    span = span_of(whole, group(layer.format(0, "self_attn.o_proj"), layer.format(0, "mlp.up_proj")))
    division = cut(whole, [span])
    assert division.given_up == ()
    (home,) = [piece for piece in division.pieces if layer.format(0, "self_attn.o_proj") in piece.parameters]
    assert layer.format(0, "mlp.up_proj") in home.parameters
    assert_equal_to_the_whole(model, batch_of(model), whole, division)


def test_a_span_as_long_as_the_model_is_given_up():
    model = tiny("plain")
    whole = made(model, batch_of(model))
    span = span_of(whole, group("model.layers.0.input_layernorm.weight", "lm_head.weight"))
    division = cut(whole, [span])
    assert division.given_up == (span,)
    assert len(division.pieces) == 9
    assert span_of(whole, group("nothing", "nowhere")) is None


def test_branches_that_do_not_wait_for_each_other_stay_together():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            hidden = self.first(x)
            return torch.relu(self.second(hidden)) + self.third(hidden)

    model, batch = Branches(), {"x": torch.randn(3, 16)}
    whole = made(model, batch)
    division = cut(whole)
    linears = [{name.split(".")[0] for name in piece.parameters} for piece in division.pieces]
    assert linears == [{"first"}, {"second", "third"}]
    assert_equal_to_the_whole(model, batch, whole, division)


def test_a_graph_without_weights_is_one_piece():
    class Plain(nn.Module):
        def forward(self, x):
            return torch.relu(x) + 1

    model, batch = Plain(), {"x": torch.randn(3)}
    whole = made(model, batch)
    division = cut(whole)
    assert len(division.pieces) == 1
    assert_equal_to_the_whole(model, batch, whole, division)
