"""Options are held against the annotations of what takes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Optional

import numpy as np
import pytest
import torch

from ptqc.components import chain
from ptqc.methods import METHODS
from ptqc.option_types import wrong_option
from ptqc.transforms import TRANSFORMS


@dataclass
class Options:
    """One option of every kind."""

    flag: bool = False
    count: int = 1
    share: float = 0.5
    text: str = ""
    word: Literal["a", "b"] = "a"
    mixed: bool | Literal["static"] = False
    perhaps: Optional[float] = None  # noqa: UP045
    several: tuple[float, ...] = ()
    table: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[int] | None = None
    call: Callable[[], None] = print
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("flag", [True, False]),
        ("count", [3, -1, np.int64(2)]),
        ("share", [3, 0.5, float("inf"), np.float32(2)]),
        ("text", ["x"]),
        ("word", ["a", "b"]),
        ("mixed", [True, "static"]),
        ("perhaps", [None, 1, 0.5]),
        ("several", [[], (1, 2.0), [1]]),
        ("table", [{}, {"a": 1}]),
        ("rows", [[1], None]),
        ("call", [len]),
        ("anything", [1, "x", torch]),
    ],
)
def test_what_fits(name, values):
    assert all(wrong_option(Options, {name: value}) is None for value in values)


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("flag", [1, 0, None, "true", [True]], "true or false"),
        ("count", [True, 1.0, "1", None], "a whole number"),
        ("share", [True, "four", [1], None], "a number"),
        ("text", [1, None], "a text"),
        ("word", ["c", 1, ["a"]], '"a" or "b"'),
        ("mixed", [1, "dynamic", None], 'true, false or "static"'),
        ("perhaps", ["x", True], "a number or none"),
        ("several", [1, "12", [1, "x"], [True]], "a list of numbers"),
        ("table", [[1], "x"], "a Mapping"),
        ("call", [1], "a Callable"),
    ],
)
def test_what_does_not(name, values, wanted):
    for value in values:
        assert wrong_option(Options, {"anything": 1, name: value}) == (name, f"{name} must be {wanted}; got {value!r}")


def test_names_that_are_not_known_are_left_to_others():
    assert wrong_option(Options, {"other": 1}) is None

    @dataclass
    class Plugin:
        x: "Missing" = None  # noqa: F821

    assert wrong_option(Plugin, {"x": 1}) is None


@pytest.mark.parametrize("name", [*METHODS.names(), *TRANSFORMS.names()])
def test_every_default_fits(name):
    """Whatever a component has by default may also be written."""
    registry = METHODS if name in METHODS.names() else TRANSFORMS
    made = registry.get(name)()
    options = {entry.name: getattr(made, entry.name) for entry in fields(made)}
    assert wrong_option(type(made), options) is None
    chain({"name": name, **options})
