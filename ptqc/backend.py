"""The compiler's door: `torch.compile(model, backend="ptqc", options={...})`.

On a quantized model it lowers the stored weights to kernels. With a method among the options it quantizes the weights of
a float model first, inside the backend, once per parameter, whatever the number of graphs and recompiles. The rest of
the graph goes to Inductor.

Options: method, bits, group_size, spec, recipe, include, exclude as in `ptqc.quantize`; `free`: release the float weights
(the model then only runs compiled); `inductor`: settings for Inductor; anything else is an option of the method.
Changing a parameter after compilation is not seen, as with Inductor's freezing.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch.utils.weak import WeakIdKeyDictionary

from ptqc.codegen.build import kernel_for
from ptqc.errors import PtqcError
from ptqc.methods import quantize_weight
from ptqc.passes.lower.lower_linears import LowerLinears
from ptqc.passes.lower.quantize_weights import QuantizeWeights
from ptqc.passes.lower.unlift import Unlifted, unlift
from ptqc.pipeline import Context, Pipeline
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Recipe, fitted_spec, load_recipe, make_rule, rule_for
from ptqc.select import matches
from ptqc.sites import output_head

__all__ = ["kept_weights", "ptqc", "stored_weights"]

log = logging.getLogger("ptqc")

_RULE_OPTIONS = ("method", "bits", "group_size", "spec")
_OWN_OPTIONS = (*_RULE_OPTIONS, "recipe", "include", "exclude", "free", "inductor")


@dataclass(frozen=True)
class _Options:
    """What the user passed in `options`, checked."""

    recipe: Recipe | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    free: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(options: Mapping[str, Any] | None) -> "_Options":
        given = dict(options or {})
        method_options = {key: value for key, value in given.items() if key not in _OWN_OPTIONS}
        recipe: Recipe | None = None
        if "recipe" in given:
            recipe = load_recipe(given["recipe"])
        elif "method" in given:
            request = {key: given[key] for key in _RULE_OPTIONS[1:] if key in given}
            recipe = [make_rule("*", given["method"], options=method_options or None, **request)]
        elif method_options or set(given) & set(_RULE_OPTIONS):
            raise PtqcError(f"options {sorted(given)} name no method; known options: {', '.join(_OWN_OPTIONS)}")
        include = given.get("include")
        return _Options(
            recipe,
            None if include is None else tuple(include),
            tuple(given.get("exclude", ())),
            bool(given.get("free", False)),
            given.get("inductor", {}),
        )


# Stored weights by parameter, then by the rule that made them: a recompile must not quantize again, and cannot once
# the float values are freed.
_STORED: WeakIdKeyDictionary = WeakIdKeyDictionary()
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()
_HEADS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def stored_weights(model: nn.Module) -> dict[str, QuantTensor]:
    """The weights that the backend has quantized for the parameters of `model`, by name.

    Raises: PtqcError if a parameter was quantized in more than one way.
    """
    found = {}
    for name, parameter in model.named_parameters():
        made = list(_STORED.get(parameter, {}).values())
        if len(made) > 1:
            raise PtqcError(f'"{name}" was compiled with {len(made)} different recipes')
        if made:
            found[name] = made[0]
    return found


def kept_weights(model: nn.Module) -> dict[str, str]:
    """The weights that the backend has left in float, and why, by name."""
    named = model.named_parameters()
    return {name: _KEPT[parameter] for name, parameter in named if parameter in _KEPT and parameter not in _STORED}


def ptqc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph: what `torch.compile(..., backend="ptqc")` calls.

    mode: an Inductor mode ("reduce-overhead", "max-autotune"). Raises: PtqcError for unknown options.
    """
    parsed = _Options.parse(options)
    graph = unlift(gm, example_inputs)
    context = Context(kernel_for)
    _remember_head()
    store = None if parsed.recipe is None else _store(parsed)
    names = dict(graph.names)
    passes = [QuantizeWeights(graph.parameters, graph.names, store), LowerLinears(names)]
    Pipeline(passes).run(graph.module, context)
    if parsed.free:
        _free(graph, context)
    for node, reason in context.kept.items():
        _KEPT[graph.parameters[node]] = reason
        log.info('"%s" stays in float: %s', graph.names[node], reason)
    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **parsed.inductor}
    compiled = compile_fx(graph.module, [example_inputs[i] for i in graph.kept], config_patches=patches or None)
    return lambda *arguments: compiled(*[arguments[i] for i in graph.kept])


def _store(options: _Options) -> Callable[[str, Tensor, bool], QuantTensor | str]:
    """What quantize-weights asks: the stored form of a parameter, or the reason to leave it."""
    assert options.recipe is not None
    recipe = options.recipe

    def store(name: str, weight: Tensor, is_transposed: bool) -> QuantTensor | str:
        if not isinstance(weight, nn.Parameter):
            return "a buffer, not a parameter"
        if options.include is not None and not matches(name, options.include):
            return "not included"
        if options.include is None and weight in _HEADS:
            return "the output head (name it in include to quantize it)"
        if matches(name, options.exclude):
            return "excluded"
        rule = rule_for(name, recipe)
        if rule is None or rule.method is None:
            return "no rule of the recipe matches" if rule is None else "the recipe keeps it"
        made = _STORED.setdefault(weight, {})
        if rule not in made:
            spec = fitted_spec(rule, weight.mT.shape if is_transposed else weight.shape)
            made[rule] = quantize_weight(weight, rule.method, spec, name=name, is_transposed=is_transposed)
        stored: QuantTensor = made[rule]
        return stored

    return store


def _remember_head() -> None:
    """Note the output head of the model that is being compiled, if it is a transformers model.

    Dynamo does not tell backends which module it traces; its translator does.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:  # not called by dynamo
        return
    for value in scope.values():
        head = output_head(value) if isinstance(value, nn.Module) else None
        if head is not None:
            _HEADS[head] = True


def _free(graph: Unlifted, context: Context) -> None:
    """Release the float values of every weight that was quantized here and is used in no other way."""
    remaining = {
        id(value.untyped_storage())
        for node, value in graph.parameters.items()
        if node not in context.quantized and not isinstance(value, QuantTensor)
    }
    for node in context.quantized:
        weight = graph.parameters[node]
        if not isinstance(weight, QuantTensor) and id(weight.untyped_storage()) not in remaining:
            weight.untyped_storage().resize_(0)
