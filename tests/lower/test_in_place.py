"""Which values are written: every spelling of writing, and everything that shares memory with one."""

import operator

import pytest
import torch
from torch import fx

from ptqc.passes.lower.in_place import is_in_place, written


def names_written(function):
    graph = fx.symbolic_trace(function).graph
    return {node.name for node in written(graph)} & {"a", "b", "c"}


CASES = {
    "method": (lambda a, b: a.add_(b), {"a"}),
    "function": (lambda a, b: torch.relu_(a) + b, {"a"}),
    "flag": (lambda a, b: torch.nn.functional.silu(a, inplace=True) + b, {"a"}),
    "out": (lambda a, b: torch.add(a, 1, out=b), {"a", "b"}),
    "overload": (lambda a, b: torch.ops.aten.add_.Tensor(a, b), {"a"}),
    "through views": (lambda a, b: a.view(-1)[:3].transpose(0, 0).mul_(b), {"a"}),
    "a list": (lambda a, b: torch._foreach_add_([a, b], 1), {"a", "b"}),
    "a copy": (lambda a, b: (a + b).mul_(2), set()),
    "clone": (lambda a, b: a.clone().mul_(b), set()),
    "arithmetic": (lambda a, b: a.__add__(b).__and__(1), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written(case):
    function, expected = CASES[case]
    assert names_written(function) == expected


@pytest.mark.parametrize(("function", "arguments"), [(operator.iadd, (1,)), (operator.setitem, (0, 1.0))])
def test_operators_that_python_hides(function, arguments):
    graph = fx.Graph()
    a = graph.placeholder("a")
    graph.call_function(function, (a, *arguments))
    assert a in written(graph)


def test_a_view_made_before_its_base_is_written():
    graph = fx.symbolic_trace(lambda a, b: (a.view(-1), a.mul_(b))).graph
    assert {node.name for node in written(graph)} == {"a", "view", "mul_"}


def test_dunder_methods():
    graph = fx.Graph()
    a = graph.placeholder("a")
    kinds = {name: is_in_place(graph.call_method(name, (a,))) for name in ("__add__", "__iadd__", "__invert__", "add_")}
    assert kinds == {"__add__": False, "__iadd__": True, "__invert__": False, "add_": True}
