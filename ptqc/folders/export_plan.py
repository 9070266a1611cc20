"""What an export into the format of another program will do to every weight, decided before a byte is written."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ptqc.act_spec import ActSpec
from ptqc.codegen.dialect import Dialect, described, stem_of
from ptqc.codegen.exporters import Fate
from ptqc.codegen.serving import disagreements, kind_of
from ptqc.errors import ExportError, SpecError
from ptqc.folders.origins import Origin
from ptqc.qtensor import QuantTensor
from ptqc.sites import find_sites
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings

__all__ = ["NEAREST", "Planned", "check_packs", "float_modules", "plan_export", "said"]

NEAREST = "nearest"
"""The request to store what a dialect cannot hold in the nearest spec that it can."""


@dataclass(frozen=True)
class Planned:
    """A weight to write. meta: as it will be stored. fate: what happens to it. was: how it is stored now."""

    name: str
    meta: QuantTensor
    fate: Fate
    was: str


def plan_export(
    origin: Origin, dialect: Dialect, format: str, may_change: bool, spec: WeightSpec | None
) -> dict[str, Planned]:
    """What happens to every weight that will be quantized, in the order of the tensors.

    may_change: store what the dialect refuses anew, as `spec`, or in the nearest without one. With a spec, float
    weights of linears are quantized too.

    Raises: ExportError naming the weights that are refused, or if none would be quantized.
    """
    modules = dict(origin.modules.named_modules())
    planned, refused = {}, []
    for name, weight in origin.tensors.items():
        if not isinstance(weight, QuantTensor):
            continue
        misplaced = _misplaced(name, origin.source[name], modules)
        reason = misplaced or dialect.refuses(weight)
        if reason is None:
            planned[name] = Planned(name, weight, "lossless", str(weight.spec))
            continue
        anew = None if misplaced else _anew(dialect, weight, spec)
        if may_change and anew is not None:
            planned[name] = Planned(name, anew, "requantized", said(weight))
        else:
            advice = "" if anew is None else f'; nearest is {said(anew)} (quant="{NEAREST}" stores it so)'
            refused.append(f'"{name}": {reason}{advice}')
    if spec is not None:
        planned |= _planned_floats(origin, dialect, spec, refused)
    if refused:
        more = f" (and {len(refused) - 3} more weights)" if len(refused) > 3 else ""
        raise ExportError(f"{format} cannot hold this model: {'; '.join(refused[:3])}{more}")
    if not planned:
        raise ExportError(f'no weight is quantized; quantize the model first, or say how: quant="{dialect.example}"')
    return {name: planned[name] for name in origin.tensors if name in planned}


def _planned_floats(origin: Origin, dialect: Dialect, spec: WeightSpec, refused: list[str]) -> dict[str, Planned]:
    """What is planned for float weights of linears; appends to the reasons."""
    planned, names = {}, _by_source(origin)
    for site in find_sites(origin.modules)[0]:
        if site.name not in names:
            refused.append(f'"{site.name}": the folder has no tensor of this name; load the model and export that')
        for name in names.get(site.name, ()):
            weight = origin.tensors[name]
            if isinstance(weight, QuantTensor):
                continue
            shape = weight.mT.shape if site.is_transposed else weight.shape
            wanted = described(spec.fit(shape), shape, weight.dtype, is_transposed=site.is_transposed)
            meta = _fitting(dialect, wanted, (ActSpec(),))
            reason = dialect.refuses(meta)
            if reason is None:
                planned[name] = Planned(name, meta, "converted", str(weight.dtype).removeprefix("torch."))
            else:
                refused.append(f'"{name}": {reason}')
    return planned


def _misplaced(name: str, source: str, modules: Mapping[str, nn.Module]) -> str | None:
    if stem_of(name) is None:
        return "it is no weight of a module, and the tensors of others have no name there; leave it in float"
    owner = modules.get(source.removesuffix("weight").removesuffix("."))
    is_other = isinstance(owner, nn.Embedding)
    return "it is an embedding, which no reader looks for in stored form; leave it in float" if is_other else None


def _anew(dialect: Dialect, weight: QuantTensor, spec: WeightSpec | None) -> QuantTensor | None:
    """The weight as the dialect can hold it, None if it cannot."""
    if weight.ndim != 2:
        return None
    nearest, act = dialect.nearest(weight)
    kept = weight.surroundings.act
    chosen = nearest if spec is None else spec.fit(weight.stored_shape)
    try:
        meta = described(chosen, weight.stored_shape, weight.dtype, is_transposed=weight.is_transposed)
        made = _fitting(dialect, meta, (kept, act, ActSpec()))
    except SpecError:
        return None
    return made if dialect.refuses(made) is None else None


def _fitting(dialect: Dialect, meta: QuantTensor, acts: tuple[ActSpec, ...]) -> QuantTensor:
    """The described weight with the first of these treatments of inputs that the dialect takes, or what it needs."""
    for act in (*acts, dialect.nearest(meta)[1]):
        around = Surroundings(act=act)
        made = described(meta.spec, meta.stored_shape, meta.dtype, around, meta.is_transposed)
        if dialect.refuses(made) is None:
            return made
    return meta


def float_modules(origin: Origin, planned: Mapping[str, Planned]) -> list[str]:
    """Modules of matrices that stay in floating point: linears, also tied ones, and routers; but not embeddings."""
    kinds = {f"{name}.weight": type(module) for name, module in origin.modules.named_modules()}
    linears = [name for name, kind in kinds.items() if issubclass(kind, nn.Linear)]
    floats = [
        name
        for name, source in origin.source.items()
        if name not in planned
        and name.endswith(".weight")
        and origin.tensors[name].ndim == 2
        and not issubclass(kinds.get(source, nn.Linear), nn.Embedding)
    ]
    tied = set(linears).difference(origin.source.values())
    return [name.removesuffix(".weight") for name in (*floats, *sorted(tied))]


def _by_source(origin: Origin) -> dict[str, list[str]]:
    """The names in a folder of each parameter."""
    names: dict[str, list[str]] = {}
    for name, source in origin.source.items():
        names.setdefault(source, []).append(name)
    return names


def check_packs(origin: Origin, planned: Mapping[str, Planned]) -> None:
    """Hold weights that serving engines merge against each other. Raises: ExportError naming those that differ."""
    kinds = {
        name: kind_of(planned[name].meta if name in planned else tensor, _order(origin, planned.get(name)))
        for name, tensor in origin.tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }
    wrong = disagreements(kinds)
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise ExportError(
            "serving engines store these as one matrix, so they must be quantized alike: "
            f"{'; '.join(wrong[:2])}{more}; "
            "give them one rule in the recipe, or pass is_fused=False for readers that do not merge them"
        )


def _order(origin: Origin, planned: Planned | None) -> Tensor | None:
    has_order = planned is not None and planned.fate == "lossless" and planned.meta.surroundings.order
    return origin.order(planned.name) if planned is not None and has_order else None


def said(weight: QuantTensor) -> str:
    """A spec, and what is done to inputs where that is anything."""
    act = weight.surroundings.act
    return str(weight.spec) if act.dtype is None else f"{weight.spec} with inputs in {act}"
