"""What is said of pieces, put together, and kept with them."""

import json

import pytest
import torch

from ptqc.engine.report import GroupOutcome, Report
from ptqc.groups import ScaledParameter, ScaleGroup


def group(name):
    entry = ScaledParameter(f"{name}.weight", -1, torch.arange(4), 1.0)
    return ScaleGroup(name, 4, "run-time", (), (entry,))


@pytest.fixture
def groups():
    return [group("a"), group("b"), group("c")]


@pytest.fixture
def piece(groups):
    """A report with something in every field."""
    made = Report()
    made.groups += [GroupOutcome(groups[2], "AWQ", "folded", 1e-12), GroupOutcome(groups[0], "AWQ", "left")]
    made.groups.append(GroupOutcome(groups[0], "AWQ", "undone", float("nan")))
    made.skipped["x.weight"] = "no group fits"
    made.coverage["experts"] = (3, 0, 40)
    made.note("in general")
    made.note("it saw nothing", "x.weight")
    made.note("it saw nothing", "y.weight")
    return made


def test_what_is_kept_comes_back(piece, groups):
    back = Report.from_json(json.loads(json.dumps(piece.to_json(groups))), groups)
    assert repr(back) == repr(piece)  # one of the numbers is nan
    assert [one.group for one in back.groups] == [one.group for one in piece.groups]


def test_pieces_add_up(piece):
    whole = Report(route="one graph, in pieces")
    whole.note("it saw nothing", "a.weight")
    whole.add(piece)
    whole.add(piece)
    assert whole.notes == ['3 weights, first "a.weight": it saw nothing', "in general"]
    assert whole.counts == {"folded": 2, "left": 2, "undone": 2}
    assert whole.skipped == piece.skipped and whole.coverage == piece.coverage
    assert piece.notes == ["in general", '2 weights, first "x.weight": it saw nothing']
