"""Sites: the parameters of a model that a method may quantize, and the reason why each other one is left.

By structure, without running anything: 1. the weight of every linear (and of Conv1D, which stores [in, out]); 2. the
packed projections of `nn.MultiheadAttention`; 3. the weights of recurrent modules, if they are named: their kernels
take dequantized weights, so that quantizing saves memory and costs time. Other parameters of two or more dimensions
(packed experts, bare matrices) are decided by how the graph uses them (`ptqc.weights`), which takes an example batch; a
model that has none of them is not run.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptqc.calibrate import moved
from ptqc.capture import CapturedGraph, capture
from ptqc.errors import first_line
from ptqc.misfit import run_once
from ptqc.qtensor import QuantTensor
from ptqc.select import Patterns, matches_any, patterns_of, unmatched
from ptqc.spec import WeightSpec
from ptqc.weights import weight_uses

__all__ = [
    "UNKNOWN_USE", "UNUSED", "Entry", "Site", "Skipped", "find_sites", "inventory", "output_head", "select_sites",
]  # fmt: skip

log = logging.getLogger("ptqc")

UNKNOWN_USE = "how it is used is unknown without an example batch (pass calibration)"
"""The reason that stands for: only running the model can tell."""

UNUSED = "no matrix product reads it"
"""The reason of a matrix that is in no graph, or in none as the operand of a product."""

_CONVOLUTION = "a convolution"
_FIXED = frozenset({UNKNOWN_USE, _CONVOLUTION})
"""Reasons that naming a weight in include does not change."""

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Site:
    """A parameter to quantize.

    name: qualified name of its first owner. owners: every (module, attribute) that holds it: tied weights have
    several. is_transposed: it stores [..., in, out]. aliases: its names in the other owners.
    """

    name: str
    weight: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]
    is_transposed: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a pattern may call it by."""
        return (self.name, *self.aliases)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is stored, [*lead, out, in]."""
        return tuple(self.weight.mT.shape if self.is_transposed else self.weight.shape)

    def bias_in(self, model: nn.Module) -> str | None:
        """Name of the bias beside the weight in the module that holds it, if no other module has the weight."""
        if len(self.owners) > 1:
            return None
        module, attribute = self.owners[0]
        beside = attribute.replace("weight", "bias")
        bias = module._parameters.get(beside)
        if bias is None or beside == attribute or bias.shape != self.stored_shape[-2:-1]:
            return None
        return next((name for name, parameter in model.named_parameters() if parameter is bias), None)

    def replace(self, weight: Tensor) -> None:
        """Put another tensor in the place of the parameter, in every owner."""
        parameter = nn.Parameter(weight, requires_grad=False)
        for module, attribute in self.owners:
            setattr(module, attribute, parameter)  # recurrent modules keep lists of their weights, and update them


@dataclass(frozen=True)
class Skipped:
    """A parameter that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Held:
    """A parameter with its names and owners."""

    weight: nn.Parameter
    names: list[str]
    owners: list[tuple[nn.Module, str]]


def _held(model: nn.Module) -> list[_Held]:
    held: dict[int, _Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, weight in module._parameters.items():
            if weight is not None and weight.ndim >= 2:
                entry = held.setdefault(id(weight), _Held(weight, [], []))
                entry.names.append(f"{prefix}.{attribute}" if prefix else attribute)
                if (module, attribute) not in entry.owners:  # a module in two places has two names and is one owner
                    entry.owners.append((module, attribute))
    return list(held.values())


def find_sites(
    model: nn.Module, batch: Mapping[str, Any] | None = None, graphs: Sequence[CapturedGraph] | None = None
) -> tuple[list[Site], list[Skipped]]:
    """Every parameter that may be quantized, and every other matrix with the reason why not.

    batch: example inputs as keyword arguments; without them those of a transformers model are tried where they are
    needed. graphs: what capture of the model gave, if that was done already. Parameters on the meta device are decided
    by structure alone without graphs. Weights already quantized are neither.
    """
    sites: list[Site] = []
    skipped: list[Skipped] = []
    unclear: list[_Held] = []
    head = output_head(model)
    for held in _held(model):
        if isinstance(held.weight, QuantTensor):
            continue
        is_transposed, reason = _by_structure(held)
        if held.weight is head and reason is None:
            reason = "the output head (name it in include to quantize it)"
        if reason is not None:
            skipped.append(Skipped(held.names[0], reason))
        elif is_transposed is None:
            unclear.append(held)
        else:
            sites.append(_site(held, is_transposed))
    for held, verdict in zip(unclear, _by_graph(model, unclear, batch, graphs), strict=True):
        if isinstance(verdict, str):
            skipped.append(Skipped(held.names[0], verdict))
        else:
            sites.append(_site(held, verdict))
    return sites, skipped


def _site(held: _Held, is_transposed: bool) -> Site:
    return Site(held.names[0], held.weight, tuple(held.owners), is_transposed, tuple(held.names[1:]))


def output_head(model: nn.Module) -> Tensor | None:
    """The weight of the output head of a transformers model, None where there is none."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _by_structure(held: _Held) -> tuple[bool | None, str | None]:
    """(is_transposed, reason to keep); (None, None) if only the graph can tell."""
    modules = [module for module, _ in held.owners]
    if not held.weight.is_floating_point():
        return None, f"holds {held.weight.dtype}"
    if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in modules):
        return None, "an embedding" if len(modules) == 1 else "tied to an embedding"
    if any(isinstance(module, _CONVOLUTIONS) for module in modules):
        return None, _CONVOLUTION
    if any(isinstance(module, _RECURRENT) for module in modules):
        return None, "of a recurrent module (name it in include to quantize it)"
    if min(held.weight.shape[-2:]) == 1 or held.weight.shape[-1] * held.weight.shape[-2] < 16:
        return None, f"shape {tuple(held.weight.shape)} is no matrix worth packing"
    return _orientation(held), None


def _orientation(held: _Held) -> bool | None:
    """Whether it stores [..., in, out], None if only the graph can tell."""
    module, attribute = held.owners[0]
    if isinstance(module, (nn.MultiheadAttention, *_RECURRENT)):
        return False
    kinds = ((nn.Linear, False), (Conv1D, True))
    return next((turned for kind, turned in kinds if isinstance(module, kind) and attribute == "weight"), None)


def _by_graph(
    model: nn.Module,
    unclear: Sequence[_Held],
    batch: Mapping[str, Any] | None,
    graphs: Sequence[CapturedGraph] | None,
) -> Iterator[bool | str]:
    """For each unclear parameter: is_transposed, or the reason to keep it."""
    if not unclear:
        return
    found = graphs if graphs is not None else _captured(model, batch, unclear)
    verdicts = None if found is None else _verdicts(found)
    for held in unclear:
        if verdicts is None:
            yield UNKNOWN_USE
        else:
            yield verdicts.get(id(held.weight), UNUSED)


def _captured(
    model: nn.Module, batch: Mapping[str, Any] | None, unclear: Sequence[_Held]
) -> Sequence[CapturedGraph] | None:
    """The graphs of a model, None where there is nothing to run it on. unclear: what they are wanted for."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    example = batch if batch is not None else getattr(model, "dummy_inputs", None)
    if example is None:
        return None
    device = next(model.parameters()).device
    example = moved(example, device)
    try:
        return capture(model, example)
    except Exception as error:
        if batch is not None:
            run_once(model, example)  # raises if the batch is at fault
        why = "dynamo cannot trace the model" if batch is not None else "the model does not run on its dummy inputs"
        names = ", ".join(held.names[0] for held in unclear[:3]) + (", ..." if len(unclear) > 3 else "")
        advice = "" if batch is not None else "; pass calibration if they are to be quantized"
        reason = first_line(error)
        log.warning("how %d weights are used (%s) is unknown: %s (%s)%s", len(unclear), names, why, reason, advice)
        return None


def _verdicts(graphs: Sequence[CapturedGraph]) -> dict[int, bool | str]:
    """For each parameter that the graphs read, by identity: is_transposed, or the reason to keep it."""
    verdicts: dict[int, bool | str] = {}
    for graph in graphs:
        for use in weight_uses(graph.module.graph, graph.parameters):
            verdict = use.reason if use.reason is not None else use.input_axis == -2
            if not isinstance(verdicts.get(id(use.parameter)), str):
                verdicts[id(use.parameter)] = verdict
    return verdicts


def select_sites(
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    model: nn.Module,
    include: Patterns | None,
    exclude: Patterns | None,
) -> tuple[list[Site], list[Skipped]]:
    """Apply the user's patterns. include: only these, also the head and embeddings if named; exclude: not these.

    A tied weight goes by each of its names. Convolutions, and weights of which only running the model can tell how they
    are used, are not quantized however they are named. Patterns that name nothing are logged.
    """
    chosen, left = list(sites), list(skipped)
    wanted = () if include is None else patterns_of(include, "include")
    unwanted = () if exclude is None else patterns_of(exclude, "exclude")
    _warn_of_misspelt(model, {"include": wanted, "exclude": unwanted})
    if include is not None:
        chosen = [site for site in chosen if matches_any(site.names, wanted)]
        left += [Skipped(site.name, "not included") for site in sites if site not in chosen]
        fixed = {entry.name for entry in skipped if entry.reason in _FIXED}
        possible = {entry.name for entry in skipped} - fixed
        named = [held for held in _held(model) if held.names[0] in possible and matches_any(held.names, wanted)]
        chosen += [_site(held, bool(_orientation(held))) for held in named]
        left = [entry for entry in left if entry.name not in {held.names[0] for held in named}]
    if unwanted:
        left += [Skipped(site.name, "excluded") for site in chosen if matches_any(site.names, unwanted)]
        chosen = [site for site in chosen if not matches_any(site.names, unwanted)]
    return chosen, left


def _warn_of_misspelt(model: nn.Module, patterns: Mapping[str, Sequence[str]]) -> None:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for what, given in patterns.items():
        for pattern in unmatched(names, given):
            log.warning("%s: the pattern %r names no parameter of the model", what, pattern)


@dataclass(frozen=True)
class Entry:
    """One parameter of a model: how it is stored, what it takes, and why it is in float if it is."""

    name: str
    spec: WeightSpec | None
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    reason: str | None = None


def inventory(model: nn.Module, skipped: Sequence[Skipped] = ()) -> list[Entry]:
    """What a model holds: an entry for every parameter, tied ones once."""
    reasons = {entry.name: entry.reason for entry in skipped}
    entries = []
    for name, weight in model.named_parameters():
        is_quantized = isinstance(weight, QuantTensor)
        size = weight.nbytes if is_quantized else weight.numel() * weight.element_size()
        dtype = str(weight.dtype).removeprefix("torch.")
        spec = weight.spec if isinstance(weight, QuantTensor) else None
        entries.append(Entry(name, spec, tuple(weight.shape), dtype, size, reasons.get(name)))
    return entries
