"""The compiler's door: `torch.compile(model, backend="ptqc", options={...})`.

On a quantized model it lowers the stored weights to kernels. With a method among the options it quantizes the weights
of a float model first, inside the backend, once per parameter, whatever the number of graphs and recompiles. The rest
of the graph goes to Inductor.

Options: method, bits, group_size, spec, recipe, include, exclude as in `ptqc.quantize`; `free`: release the float
weights (the model then only runs compiled); `exact`: kernels must not quantize activations on their own account;
`keep_stored`: quantized weights keep their parts besides what kernels hold (`ptqc.held`); `torch_attention`: attention
stays torch's; `inductor`: settings for Inductor; anything else is an option of the method.
Changing a float parameter after compilation is not seen, as with Inductor's freezing.
`kernel_table(model)` says which kernel serves which weight, and why; PTQC_LOGS=kernels prints it while compiling.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx

from ptqc.attention import Attend, AttentionRequest
from ptqc.codegen.attention import attention_for
from ptqc.codegen.build import kernel_for, refusals_of, target_for
from ptqc.errors import PtqcError
from ptqc.identity import mark_of
from ptqc.kernel_log import chosen_kernels, kernel_table, log_as_asked, note_kernels
from ptqc.passes.lower.few_launches import settings_for
from ptqc.passes.lower.order import lowering
from ptqc.passes.lower.unlift import Unlifted, tell_static_inputs, unlift
from ptqc.pipeline import Context
from ptqc.program import value_of
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Recipe, load_recipe, make_rule
from ptqc.stored import Selection, call_alike, kept_weights, learn_model, name_of, note_kept, stored_weights
from ptqc.views import function_name

__all__ = ["chosen_kernels", "kept_weights", "kernel_table", "ptqc", "stored_weights"]

log = logging.getLogger("ptqc")
log_as_asked()

_RULE_OPTIONS = ("method", "bits", "group_size", "spec", "activation")
_SWITCHES = ("free", "exact", "keep_stored", "torch_attention")
_OWN_OPTIONS = (*_RULE_OPTIONS, "recipe", "include", "exclude", *_SWITCHES, "inductor")


@dataclass(frozen=True)
class _Options:
    """What the user passed in `options`, checked."""

    selection: Selection | None = None
    free: bool = False
    exact: bool = False
    keep_stored: bool = False
    torch_attention: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(options: Mapping[str, Any] | None) -> "_Options":
        """Check what the user passed. Raises: PtqcError naming the options there are."""
        given = dict(options or {})
        method_options = {key: value for key, value in given.items() if key not in _OWN_OPTIONS}
        switches = {name: bool(given.get(name, False)) for name in _SWITCHES}
        common = switches | {"inductor": given.get("inductor", {})}
        if "recipe" in given:
            recipe = load_recipe(given["recipe"])
        elif "method" in given:
            request = {key: given[key] for key in _RULE_OPTIONS[1:] if key in given}
            recipe = [make_rule("*", given["method"], options=method_options or None, **request)]
        elif method_options or set(given) & set(_RULE_OPTIONS):
            raise PtqcError(f"options {sorted(given)} name no method; known options: {', '.join(_OWN_OPTIONS)}")
        else:
            return _Options(None, **common)
        _refuse_data(recipe)
        include = given.get("include")
        selection = Selection(recipe, None if include is None else tuple(include), tuple(given.get("exclude", ())))
        return _Options(selection, **common)


def _refuse_data(recipe: Recipe) -> None:
    """A backend sees one graph with its parameters: no calibration data, and nothing that is between graphs."""
    needy = next((rule for rule in recipe if rule.method is not None and not rule.is_data_free), None)
    if needy is not None:
        raise PtqcError(
            f"{needy.label} needs calibration data, which a compiler backend never sees; call "
            f'ptqc.quantize(model, ..., calibration=...) first, then torch.compile(model, backend="ptqc")'
        )


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
    learn_model()
    _warn_of_break(gm, parsed)
    _warn_of_floats(gm)
    graph = unlift(gm, example_inputs)
    names = {node: name_of(parameter, graph.names[node]) for node, parameter in graph.parameters.items()}
    attention = _torch_attention if parsed.torch_attention else attention_for
    context = Context(kernel_for, target_for, refusals_of, attention, parsed.exact, parsed.keep_stored)
    store = parsed.selection.store if parsed.selection else None
    changed = lowering(graph.parameters, names, store).run(graph.module, context)
    note_kernels(context.chosen)
    for node, reason in context.kept.items():
        note_kept(graph.parameters[node], names[node], reason)
    if parsed.free:
        _free(graph, context)
    tell_static_inputs(graph.module)
    told = settings_for(graph.module, changed) | (torch._inductor.list_mode_options(mode) if mode else {})
    patches = {**told, **parsed.inductor}
    compiled: Any = compile_fx(graph.module, [example_inputs[i] for i in graph.kept], config_patches=patches or None)
    return _Compiled(gm, graph, compiled, options, mode)


def _torch_attention(request: AttentionRequest) -> Attend | str:
    return "torch's attention was asked for"


class _Compiled:
    """A compiled graph that holds its weights, for the parameters it was compiled with.

    Dynamo reuses the code of a frame for every module of one class, with other parameters as inputs, without asking the
    backend. Other parameters therefore get a compiled graph of their own here.
    """

    def __init__(
        self, gm: fx.GraphModule, graph: Unlifted, compiled: Callable[..., Any], options: Any, mode: str | None
    ) -> None:
        self._compiled, self._kept = compiled, tuple(graph.kept)
        held = list(zip(graph.positions, graph.parameters.values(), strict=True))
        self._floats = [(i, weakref.ref(value)) for i, value in held if not isinstance(value, QuantTensor)]
        self._stored = [(i, weakref.ref(value.mark)) for i, value in held if isinstance(value, QuantTensor)]
        self._source = _copy(gm)
        self._compile = {"backend": ptqc, "options": options, **({"mode": mode} if mode else {})}
        self._variants: dict[tuple[int, ...], tuple[list[Any], Callable[..., Any]]] = {}

    def __call__(self, *arguments: Any) -> Any:
        for index, parameter in self._floats:
            if arguments[index] is not parameter():
                return self._variant(arguments)(*[arguments[i] for i in self._kept])
        for index, mark in self._stored:
            if arguments[index].mark is not mark():
                return self._variant(arguments)(*[arguments[i] for i in self._kept])
        return self._compiled(*[arguments[i] for i in self._kept])

    def _variant(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        expected: list[tuple[int, weakref.ref[Any]]] = [*self._floats, *self._stored]
        parameters = [arguments[index] for index, _ in expected]
        marks = list(map(mark_of, parameters))
        key = tuple(map(id, marks))
        if key not in self._variants:
            for parameter, (_, other) in zip(parameters, expected, strict=True):
                call_alike(parameter, other())
            module = unlift(self._source, arguments).module
            module.meta = {}
            self._variants[key] = (marks, _recompile(module, self._compile))
        return self._variants[key][1]


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own, since dynamo goes on using its graph; it refers to no input."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.meta.pop("grapharg", None)  # a module with weak references to its parameters cannot be moved
    return fx.GraphModule(gm, graph)


def _recompile(module: nn.Module, settings: Mapping[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(module, **settings)
    return compiled


def _warn_of_break(gm: fx.GraphModule, options: _Options) -> None:
    reason = getattr(gm, "compile_subgraph_reason", None)
    if options.selection is not None and getattr(reason, "graph_break", False):
        first = str(getattr(reason, "reason", "")).strip().split("\n")[0]
        log.warning(
            "graph break (%s): weights used between graphs stay in float; "
            "ptqc.quantize(model, ...) before torch.compile reaches them all",
            first,
        )


def _warn_of_floats(gm: fx.GraphModule) -> None:
    """With `dynamic=True` dynamo takes numbers of modules, as a norm's epsilon, for inputs unless it is told not to."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder" and node.users]
    numbers = [node for node in inputs if getattr(value_of(node), "dtype", None) == torch.float64]
    if any(all(function_name(user) == "item" for user in node.users) for node in numbers):
        log.warning(
            "epsilons and scales are inputs of this graph, so norms and attention stay outside of kernels; "
            "torch._dynamo.config.specialize_float = True before compiling makes them constants"
        )


def _free(graph: Unlifted, context: Context) -> None:
    """Release the float values of every weight that was quantized here and is used in no other way."""
    others = [value for node, value in graph.parameters.items() if node not in context.quantized]
    remaining = {value.untyped_storage()._cdata for value in others if not isinstance(value, QuantTensor)}
    for node in context.quantized:
        weight = graph.parameters[node]
        if not isinstance(weight, QuantTensor) and weight.untyped_storage()._cdata not in remaining:
            weight.untyped_storage().resize_(0)
