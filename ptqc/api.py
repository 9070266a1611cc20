"""The Python door: `quantize`, and re-exports of `save`, `load` and `export`."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ptqc.assign import assign, quantize_site
from ptqc.calibrate import batches
from ptqc.errors import PtqcError
from ptqc.methods import Method
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Recipe, Rule, load_recipe, make_rule
from ptqc.sites import Site, Skipped, find_sites, select_sites
from ptqc.spec import WeightSpec

__all__ = ["quantize"]

log = logging.getLogger("ptqc")

Model = TypeVar("Model", bound=nn.Module)


def quantize(
    model: Model,
    method: str | Method | None = None,
    *,
    bits: float | None = None,
    group_size: int | None = None,
    spec: str | WeightSpec | None = None,
    recipe: str | Path | Recipe | Sequence[Mapping[str, Any]] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> Model:
    """Quantize the weights of a model in place and return it.

    method: a name that `ptqc methods` lists, or a configured method; `options` are its options.
    bits, group_size: what to ask of the method; group_size -1 is the whole row, and a group that does not divide a
    weight gives way to the nearest that does (logged). spec: an exact storage format instead ("int4g64z", "nf4g64dq").
    recipe: rules (pattern, method, spec ...) or a YAML file of them instead; first match wins.
    include, exclude: patterns of names, see `ptqc.select`; by default every weight of a linear-like operation except
    the output head, embeddings and routers. calibration: strings (with tokenizer), token tensors, dicts of model
    inputs, a DataLoader or a file, see `ptqc.calibrate`; methods without data use one batch of it to find weights.

    Example: `ptqc.quantize(model, "hqq", bits=4, group_size=64)`.

    Raises: PtqcError if nothing would be quantized, SpecError and WeightError naming the weight at fault; the model is
    unchanged then.
    """
    rules = _rules(method, recipe, {"bits": bits, "group_size": group_size, "spec": spec, "options": options or None})
    batch = None if calibration is None else batches(calibration, tokenizer, limit=1)[0]
    sites, skipped = select_sites(*find_sites(model, batch), model, include, exclude)
    work, left = assign(sites, rules)
    skipped += left
    if not work:
        raise PtqcError(_nothing_to_do(model, skipped))
    quantized = [quantize_site(site, rule) for site, rule in _shown(work, progress)]
    for (site, _), weight in zip(work, quantized, strict=True):
        site.replace(weight)
    if hasattr(model, "save_pretrained"):
        from ptqc.folders.hf import attach  # here: plain modules need no transformers

        attach(model)
    _report(work, quantized, skipped, progress)
    return model


def _rules(method: str | Method | None, recipe: Any, request: dict[str, Any]) -> Recipe:
    if (method is None) == (recipe is None):
        raise PtqcError("give either a method or a recipe")
    if recipe is None:
        return [make_rule("*", method, **request)]
    given = [name for name, value in request.items() if value is not None]
    if given:
        raise PtqcError(f"a recipe says everything itself; drop {', '.join(given)}")
    return load_recipe(recipe)


def _shown(work: Sequence[tuple[Site, Rule]], progress: bool) -> Iterable[tuple[Site, Rule]]:
    columns = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True) if progress else None
    with bar or nullcontext():
        task = bar.add_task("", total=len(work), name="") if bar else None
        for site, rule in work:
            if bar is not None and task is not None:
                bar.update(task, name=site.name)
            yield site, rule
            if bar is not None and task is not None:
                bar.advance(task)


def _nothing_to_do(model: nn.Module, skipped: Sequence[Skipped]) -> str:
    if any(isinstance(weight, QuantTensor) for weight in model.parameters()):
        return "every weight that may be quantized already is; start from the float model"
    reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in skipped[:3])
    return f"nothing would be quantized ({reasons or 'the model has no matrices'})"


def _report(
    work: Sequence[tuple[Site, Rule]], quantized: Sequence[QuantTensor], skipped: Sequence[Skipped], progress: bool
) -> None:
    specs = Counter(str(weight.spec) for weight in quantized)
    before = sum(site.weight.numel() * site.weight.element_size() for site, _ in work)
    after = sum(weight.nbytes for weight in quantized)
    kinds = ", ".join(f"{count} x {name}" for name, count in specs.most_common())
    lines = [f"quantized {len(work)} weights ({kinds}): {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB"]
    for reason, count in Counter(entry.reason for entry in skipped).items():
        lines.append(f"  {count} left in float: {reason}")
    if progress:
        console = Console(stderr=True)
        for line in lines:
            console.print(line, highlight=False, markup=False)
    for line in lines:
        log.info(line)
