import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn

from ptqc.capture import capture
from ptqc.engine.activations import Activations
from ptqc.engine.grouping import groups_for
from ptqc.engine.in_memory import InMemory
from ptqc.engine.jobs import jobs_of
from ptqc.engine.report import Report
from ptqc.engine.sequential import plan_pieces, run_sequential
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.program import program
from ptqc.recipe import make_rule
from ptqc.sites import find_sites
from tests.tiny import tiny

FIRST, LAST = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


@dataclass(frozen=True)
class Spy(RoundToNearest):
    """Rounds to nearest, and remembers what it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    seen: list = field(default_factory=list, compare=False)

    def choose(self, weight, spec, statistics):
        self.seen.append(dict(statistics))
        return super().choose(weight, spec, statistics)


@dataclass
class Case:
    """A model with everything that a run takes."""

    model: nn.Module
    rule: object
    batches: list = field(default_factory=list)
    include: str = ""
    groups: list = field(default_factory=list)

    def __post_init__(self):
        torch.manual_seed(1)
        self.batches = self.batches or [{"input_ids": torch.randint(128, (2, 24))} for _ in range(3)]
        sites, _ = find_sites(self.model)
        self.sites = [site for site in sites if self.include in site.name]
        self.jobs = jobs_of([(site, self.rule) for site in self.sites])
        self.weights = InMemory(self.model, self.sites, self.jobs)
        self.report = Report()
        (graph,) = capture(self.model, self.batches[0])
        self.program = program(graph, self.model, self.batches[0])

    def run(self, **options):
        run_sequential(self.program, self.batches, self.jobs, self.groups, self.weights, self.report, **options)
        return self.weights.commit()


def made(method, name="plain", **options):
    return Case(tiny(name), make_rule("*", method, spec="int4g32", **options))


def hessian(model, module, batches):
    """The mean of x xT at the input of a linear, of a model as it is."""
    rows = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, given: rows.append(given[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", ["plain", "transposed", "experts"])
def test_codes_of_a_method_without_data_are_those_of_the_weights_alone(name):
    from ptqc.assign import quantize_site

    case = made("rtn", name)
    expected = {site.name: quantize_site(site, case.rule) for site in case.sites}
    found = case.run()
    assert found.keys() == expected.keys()
    for one, weight in expected.items():
        assert all(torch.equal(found[one].parts[part], value) for part, value in weight.parts.items()), one


@pytest.mark.parametrize("activation", ["float", "int8-token"])
def test_each_piece_is_observed_behind_the_quantized_pieces_before_it(activation):
    spy = Spy()
    case = made(spy, activation=activation)
    whole = hessian(tiny("plain"), LAST.removesuffix(".weight"), case.batches)
    case.run()
    assert len(spy.seen) == len(case.jobs) == 14
    module = LAST.removesuffix(".weight")  # still float when its own piece is observed
    case.model.get_submodule(module).weight = tiny("plain").get_submodule(module).weight
    behind = hessian(case.model, LAST.removesuffix(".weight"), case.batches)
    seen = spy.seen[[job.name for job in case.jobs].index(LAST)]["hessian"]
    assert torch.allclose(seen, behind, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(seen, whole, rtol=1e-2, atol=1e-7)


def test_weights_that_read_one_value_get_one_hessian():
    spy = Spy()
    made(spy).run()
    assert spy.seen[0]["hessian"] is spy.seen[1]["hessian"] is spy.seen[2]["hessian"]
    assert spy.seen[3]["hessian"] is not spy.seen[0]["hessian"]


def test_where_values_are_kept_does_not_change_a_bit(tmp_path):
    found = []
    for is_on_disk in (False, True):
        spy = Spy()
        case = made(spy)
        case.run(activations=Activations(3, on_disk=is_on_disk, folder=tmp_path))
        found.append([given["hessian"] for given in spy.seen])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not list(tmp_path.iterdir())


@dataclass
class Kept:
    """Keeps the quantized weights of pieces, and what was said of them, in dictionaries."""

    weights: object = None
    pieces: dict = field(default_factory=dict)
    said: dict = field(default_factory=dict)
    events: list = field(default_factory=list)

    def restore(self, piece, names):
        for name, weight in self.pieces.get(piece.index, {}).items():
            self.weights.store(name, weight)
        return self.said[piece.index] if piece.index in self.pieces else None

    def keep(self, piece, names, said):
        self.pieces[piece.index] = {name: self.weights.current(name) for name in names}
        self.said[piece.index] = json.loads(json.dumps(said))

    def leave(self, piece):
        self.events.append(piece.index)


@pytest.mark.parametrize("finished", [1, 6])
def test_a_run_goes_on_behind_its_finished_pieces(finished):
    kept, first, second = Kept(), Spy(), Spy()
    case = made(first)
    kept.weights = case.weights
    expected = case.run(checkpoints=kept)
    assert kept.events == [*range(8)]  # the output head is not quantized: its piece never runs

    again = made(second)
    some = Kept(again.weights, {index: kept.pieces[index] for index in range(finished)}, kept.said)
    found = again.run(checkpoints=some)
    assert len(second.seen) == sum(len(kept.pieces[index]) for index in range(finished, 8))
    for name, weight in expected.items():
        assert all(torch.equal(found[name].parts[part], value) for part, value in weight.parts.items())


def test_what_was_said_of_finished_pieces_is_said_again():
    kept, rule = Kept(), make_rule("*", ["awq", "bias_correction", "rtn"], spec="int4g32")
    case, again = (Case(tiny("plain"), rule) for _ in range(2))
    for one in (case, again):
        one.groups = groups_for(one.model, [one.program], one.batches[0], one.jobs, is_whole=True)
    kept.weights = case.weights
    case.run(checkpoints=kept)
    assert case.report.notes and "folded" in case.report.counts
    again.run(checkpoints=Kept(again.weights, {index: kept.pieces[index] for index in range(3)}, kept.said))
    assert again.report.notes == case.report.notes
    found, expected = ([(g.group.value, g.transform, g.done) for g in one.report.groups] for one in (again, case))
    assert found == expected


def test_progress_rises_to_its_end():
    steps = []
    made(Spy()).run(on_progress=lambda what, done, total: steps.append((what, done, total)))
    amounts = [done for _, done, _ in steps]
    assert amounts == sorted(amounts) and amounts[-1] == steps[-1][2]
    assert any("quantizing model.layers.1" in what for what, _, _ in steps)


def test_what_never_runs_is_quantized_without_data():
    model = tiny("plain")
    model.side = nn.Linear(64, 64)
    case = Case(model, make_rule("*", Spy(), spec="int4g32"))
    found = case.run()
    assert "side.weight" in found
    assert any("side.weight" in note and "never came by" in note for note in case.report.notes)


def test_a_weight_of_two_pieces_belongs_to_the_first():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.first(torch.relu(self.middle(torch.relu(self.first(x)))))

    torch.manual_seed(0)
    spy = Spy()
    case = Case(Twice(), make_rule("*", spy, spec="int4g32"), [{"x": torch.randn(50, 32)}])
    plan = plan_pieces(case.program, case.jobs, [], case.report)
    assert {index: [job.name for job in jobs] for index, jobs in plan.jobs.items()} == {
        0: ["first.weight"],
        1: ["middle.weight"],
    }
    case.run(plan=plan)
    assert any("read by 2 pieces" in note for note in case.report.notes)
    assert len(spy.seen) == 2
