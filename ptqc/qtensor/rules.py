"""What is known about operators of ATen on stored weights: a rule for each, which may decline (NotImplemented)."""

from collections.abc import Callable
from typing import Any

__all__ = ["RULES", "Rule", "rule"]

Rule = Callable[..., Any]

RULES: dict[Any, Rule] = {}
"""Operator, or the name of one that another package brings -> what is done instead; it takes the arguments of the
operator, of which at least one is a QuantTensor."""


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """A decorator that files a rule under operators."""

    def file_under(made: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, made))
        return made

    return file_under
