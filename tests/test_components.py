"""What a user writes for a method: names, instances, lists, mappings, and where the options go."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from ptqc.act_spec import ActSpec
from ptqc.components import chain, describe
from ptqc.errors import PtqcError, UnknownNameError
from ptqc.methods import METHODS
from ptqc.passes.methods.hqq import HalfQuadratic
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.transforms import TRANSFORMS, Transform


@dataclass(frozen=True)
class Spin(Transform):
    """A transform with a method of its own."""

    default_method: ClassVar[str] = "hqq"
    default_options: ClassVar[dict] = {"zero": "int"}
    default_group: ClassVar[int] = 128
    turns: int = 1
    norm: float = 1.0


@dataclass(frozen=True)
class Plain(Transform):
    """A transform with nothing of its own."""

    turns: int = 2


@dataclass(frozen=True)
class Bringing(RoundToNearest):
    """A method that brings a transform."""

    brings: ClassVar[tuple] = ("plain", ("spin", {"turns": 5}))


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(TRANSFORMS._entries, "spin", Spin)
    monkeypatch.setitem(TRANSFORMS._entries, "plain", Plain)
    monkeypatch.setitem(METHODS._entries, "bringing", Bringing)


@pytest.mark.parametrize(
    ("written", "transforms", "method"),
    [
        ("rtn", (), RoundToNearest()),
        (HalfQuadratic(norm=1), (), HalfQuadratic(norm=1)),
        ("spin", (Spin(),), HalfQuadratic(zero="int")),
        (["plain", Spin(turns=3)], (Plain(), Spin(turns=3)), HalfQuadratic(zero="int")),
        ("plain + rtn", (Plain(),), RoundToNearest()),
        ([{"name": "plain", "turns": 4}, "hqq"], (Plain(turns=4),), HalfQuadratic()),
        ({"name": "rtn", "symmetric": False}, (), RoundToNearest(symmetric=False)),
        ("bringing", (Plain(), Spin(turns=5)), Bringing()),
        (["spin", "bringing"], (Plain(), Spin()), Bringing()),
    ],
)
def test_every_way_of_writing(written, transforms, method):
    made = chain(written)
    assert set(made.transforms) == set(transforms)
    assert made.method == method


def test_a_transform_alone_brings_the_group_of_its_method():
    assert (chain("spin").group, chain("plain").group, chain(["spin", "hqq"]).group) == (128, None, None)
    assert chain("spin").activation is None


def test_options_go_to_the_one_that_knows_them():
    made = chain("spin", {"turns": 7, "norm": 2.0, "iterations": 9})  # hqq has a norm too; what was named comes first
    assert made.transforms == (Spin(turns=7, norm=2.0),)
    assert made.method == HalfQuadratic(zero="int", iterations=9)
    assert chain("plain+hqq", {"turns": 3, "norm": 1.0}).method.norm == 1.0
    assert chain("bringing", {"symmetric": False}).method == Bringing(symmetric=False)


@pytest.mark.parametrize(
    ("written", "options", "says"),
    [
        ("spin+hqq", {"norm": 1.0}, "spin and hqq both have an option norm; write"),
        ("spin+hqq", {"x": 1.0}, "no option is called x; transform 'spin' knows norm, turns; method 'hqq' knows"),
        ("spin", {"x": 1.0}, "no option is called x; transform 'spin' knows"),
        ("rtn", {"x": 1}, "method 'rtn' has no option x; known: symmetric"),
        (RoundToNearest(), {"symmetric": True}, "already configured"),
        ({"name": "plain", "x": 1}, {}, "transform 'plain' has no option x"),
        ({"name": "plain", "turns": "1"}, {}, "transform 'plain': turns must be a whole number; got '1'"),
        ("spin+rtn", {"norm": True}, "transform 'spin': norm must be a number; got True"),
        ({"turns": 1}, {}, '"name"'),
        ("rtn+plain", {}, "rtn chooses the codes and goes last, but plain follows"),
        (["rtn", "hqq"], {}, "rtn chooses the codes and goes last, but hqq follows"),
        ("plain+plain+rtn", {}, "plain is named twice"),
        ([], {}, "name a method"),
        (RoundToNearest, {}, "neither a name nor a configured"),
        (3, {}, "neither a name nor a configured"),
        ("auto", {}, "auto chooses a recipe"),
    ],
)
def test_mistakes(written, options, says):
    with pytest.raises(PtqcError, match=says.replace("+", r"\+")):
        chain(written, options)


def test_unknown_names_answer_with_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no method is called 'hqqq'; known: .*hqq.*; transforms: .*spin"):
        chain("hqqq")


def test_what_describes_a_component_reads_back():
    assert describe(Spin(turns=3)) == {"name": "spin", "turns": 3}
    assert chain([describe(Spin(turns=3)), describe(HalfQuadratic())]).transforms == (Spin(turns=3),)


def test_a_transform_may_ask_for_quantized_inputs(monkeypatch):
    @dataclass(frozen=True)
    class Smooth(Plain):
        default_activation: ClassVar[ActSpec] = ActSpec(dtype="int8")
        seen: tuple = field(default=())

    monkeypatch.setitem(TRANSFORMS._entries, "smooth", Smooth)
    assert str(chain("smooth").activation) == "int8-token"


def test_anything_that_quantizes_can_be_described():
    @dataclass(frozen=True)
    class Odd(RoundToNearest):
        levels: tuple[float, ...] = ()
        how: object = None

    class Bare(RoundToNearest):
        pass

    assert describe(Odd(levels=(1.0, 2.0), how=int)) == {"name": "Odd", "levels": [1.0, 2.0], "how": "<class 'int'>"}
    assert describe(Bare()) == {"name": "Bare"}
