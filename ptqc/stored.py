"""What the backend knows about parameters across graphs and recompiles: stored forms, reasons, names.

All keys are parameters by identity and weak (`ptqc.identity`). A parameter is quantized once per rule, whatever the
number of graphs that read it: a recompile must not quantize again, and cannot once the float values are freed. What one
graph of a model decides about a parameter (tied, a router, hidden by a graph break) holds in all of them.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator

from ptqc.errors import PtqcError
from ptqc.identity import WeightTable
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Recipe, Rule, rule_for
from ptqc.select import matches_any
from ptqc.sites import output_head
from ptqc.weights import WeightUse

__all__ = [
    "Selection",
    "call_alike",
    "kept_weights",
    "learn_model",
    "name_of",
    "note_kept",
    "stored_forms",
    "stored_weights",
]

log = logging.getLogger("ptqc")

_stored: WeightTable[dict[Rule, QuantTensor]] = WeightTable()
_kept: WeightTable[str] = WeightTable()
_pinned: WeightTable[str] = WeightTable()
_heads: WeightTable[bool] = WeightTable()
_names: WeightTable[tuple[str, ...]] = WeightTable()


def stored_weights(model: nn.Module) -> dict[str, QuantTensor]:
    """The weights that the backend has quantized for the parameters of `model`, by name.

    Raises: PtqcError if a parameter was quantized in more than one way.
    """
    found = {}
    for name, parameter in model.named_parameters():
        made = list(_stored.get(parameter, {}).values())
        if len(made) > 1:
            raise PtqcError(f'"{name}" was compiled with {len(made)} different recipes')
        if made:
            found[name] = made[0]
    return found


def stored_forms(parameter: nn.Parameter) -> list[QuantTensor]:
    """Every form in which the backend has stored a float parameter, one for each rule."""
    return list(_stored.get(parameter, {}).values())


def kept_weights(model: nn.Module) -> dict[str, str]:
    """The weights that compiled graphs read and that the backend has left in float, and why, by name.

    A matrix in neither this nor `stored_weights` was read by no compiled graph.
    """
    named = model.named_parameters()
    return {name: _kept[parameter] for name, parameter in named if parameter in _kept and parameter not in _stored}


def note_kept(parameter: nn.Parameter, name: str, reason: str) -> None:
    """Remember why a parameter stays in float."""
    _kept[parameter] = reason
    log.info('"%s" stays in float: %s', name, reason)


def learn_model() -> None:
    """Learn names and output head of the module that dynamo is tracing now.

    Dynamo tells a backend where a parameter was found in the frame, not which model it belongs to; its translator
    knows. The first, outermost module that names a parameter wins.
    """
    try:
        scope: dict[str, Any] = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:  # not called by dynamo
        return
    for value in scope.values():
        if not isinstance(value, nn.Module):
            continue
        head = output_head(value)
        if head is not None:
            _heads[head] = True
        names: dict[nn.Parameter, tuple[str, ...]] = {}
        for name, parameter in value.named_parameters(remove_duplicate=False):
            names[parameter] = (*names.get(parameter, ()), name)
        for parameter, known in names.items():
            _names.setdefault(parameter, known)


def name_of(parameter: nn.Parameter, otherwise: str) -> str:
    """Qualified name of a parameter in the outermost model seen, else what dynamo calls it."""
    return _names.get(parameter, (otherwise,))[0]


def call_alike(parameter: nn.Parameter, other: object) -> None:
    """Give a parameter the name and the part of another that stands in the same place of a module of the same class.

    other: that parameter, its mark, or None where it is gone.
    """
    if other is None:
        return
    if other in _names:
        _names.setdefault(parameter, _names[other])
    if other in _heads:
        _heads[parameter] = True


@dataclass(frozen=True)
class Selection:
    """Which parameters the user wants quantized, and how: what quantize-weights asks."""

    recipe: Recipe
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()

    def store(self, name: str, use: WeightUse) -> QuantTensor | str:
        """The stored form of a parameter, made on first use, or the reason to leave it."""
        weight = use.parameter
        rule = rule_for(name, self.recipe, _names.get(weight, ()))
        reason = self._reason_to_keep(name, use, rule)
        if reason is not None:
            return reason
        assert rule is not None and rule.method is not None
        made = _stored.setdefault(weight, {})
        if rule not in made:
            made[rule] = rule.quantize(weight, name=name, is_transposed=use.input_axis == -2)
        return made[rule]

    def _reason_to_keep(self, name: str, use: WeightUse, rule: Rule | None) -> str | None:
        if rule is not None and rule in _stored.get(use.parameter, {}):
            return None
        if use.reason is not None:
            _pinned[use.parameter] = use.reason
        names = (name, *_names.get(use.parameter, ()))
        checks: tuple[tuple[Callable[[], bool], str], ...] = (
            (lambda: use.parameter in _pinned, _pinned.get(use.parameter, "")),
            (lambda: self.include is not None and not matches_any(names, self.include), "not included"),
            (
                lambda: self.include is None and use.parameter in _heads,
                "the output head (name it in include to quantize it)",
            ),
            (lambda: matches_any(names, self.exclude), "excluded"),
            (lambda: rule is None, "no rule of the recipe matches"),
            (lambda: rule is not None and rule.method is None, "the recipe keeps it"),
        )
        return next((reason for holds, reason in checks if holds()), None)
