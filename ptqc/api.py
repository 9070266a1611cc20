"""The Python door: `quantize`, and what it has to say."""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import nn

from ptqc.act_spec import ActSpec
from ptqc.assign import assign, nothing_to_do, quantize_site
from ptqc.auto import auto
from ptqc.calibrate import batches
from ptqc.components import Component
from ptqc.engine.report import Report
from ptqc.engine.run import quantize_calibrated
from ptqc.errors import PtqcError
from ptqc.option_types import wrong_option
from ptqc.plan import plan_work
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Recipe, Rule, recipe_rows, remember, requested_rules, wants
from ptqc.sites import Site, Skipped, find_sites, select_sites
from ptqc.spec import WeightSpec

__all__ = ["quantize", "report_of"]

log = logging.getLogger("ptqc")

Model = TypeVar("Model", bound=nn.Module)
Work = Sequence[tuple[Site, Rule]]
_reports: WeakKeyDictionary[nn.Module, Report] = WeakKeyDictionary()


def quantize(
    model: Model,
    method: Component | Sequence[Component] | None = None,
    *,
    bits: float | None = None,
    group_size: int | None = None,
    spec: str | WeightSpec | None = None,
    activation: str | ActSpec | None = None,
    recipe: str | Path | Recipe | Sequence[Mapping[str, Any]] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    samples: int = 128,
    window: int = 512,
    seed: int = 0,
    sequential: bool = True,
    progress: bool = True,
    **options: Any,
) -> Model:
    """Quantize the weights of a model in place and return it.

    method: a name that `ptqc methods` lists, a configured method, or transforms and a method, as in
    ["smoothquant", "gptq"]; see `ptqc.components`. `options` are its options. "auto" chooses the bits of every weight
    for a mean of `bits`, see `ptqc.auto`.
    bits, group_size: what to ask of the method; group_size -1 is the whole row, and a group that does not divide a
    weight gives way to the nearest that does (logged). spec: an exact storage format instead ("int4g64z", "nf4g64dq").
    activation: how inputs are quantized at run time ("int8-token"), if not as the method has it.
    recipe: rules (pattern, method, spec ...) or a YAML file of them instead; first match wins.
    include, exclude: patterns of names, see `ptqc.select`; by default every weight of a linear-like operation except
    the output head, embeddings and routers.
    calibration: strings (with tokenizer), token tensors, dicts of model inputs, a DataLoader or a file, see
    `ptqc.calibrate`; samples, window, seed: how many windows of how many tokens are drawn from text. Methods without
    data use one batch of it to find weights.
    sequential: quantize piece by piece, each calibrated behind the quantized pieces before it.

    Example: `ptqc.quantize(model, "gptq", bits=4, group_size=128, calibration=texts, tokenizer=tokenizer)`.

    Raises: PtqcError if nothing would be quantized, SpecError and WeightError naming the weight at fault; the model is
    unchanged then.
    """
    request = {"bits": bits, "group_size": group_size, "spec": spec, "activation": activation}
    if method == "auto" and recipe is None:
        asked = request | {"tokenizer": tokenizer, "seed": seed, "include": include, "exclude": exclude} | options
        with _shown(progress) as advance:
            rules = _auto(model, calibration, asked, advance)
    else:
        rules = requested_rules(method, recipe, request | {"options": options or None})
    drawn = _drawn(calibration, tokenizer, rules, samples=samples, window=window, seed=seed)
    sites, skipped = select_sites(*find_sites(model, drawn[0] if drawn else None), model, include, exclude)
    work, left = assign(sites, rules, has_data=bool(drawn))
    skipped += left
    if not work:
        raise PtqcError(_nothing_to_do(model, skipped))
    if progress:
        tokens = sum(max(map(_numel, batch.values()), default=0) for batch in drawn)
        _console().print(plan_work(model, work, skipped, tokens).short(), highlight=False, markup=False)
    before = sum(site.weight.numel() * site.weight.element_size() for site, _ in work)
    with _shown(progress) as advance:
        if all(rule.is_data_free for _, rule in work):
            quantized = _quantize_alone(work, advance)
            _reports.pop(model, None)
        else:
            quantized, report = quantize_calibrated(model, work, drawn, is_sequential=sequential, on_progress=advance)
            _reports[model] = report
            skipped += [Skipped(name, reason) for name, reason in report.skipped.items()]
            report.skipped |= {entry.name: entry.reason for entry in left if wants(entry.name, rules)}
    remember(model, recipe_rows(rules))
    if hasattr(model, "save_pretrained"):
        from ptqc.folders.hf import attach  # here: plain modules need no transformers

        attach(model)
    _report(before, list(quantized.values()), skipped, _reports.get(model), progress)
    return model


def report_of(model: nn.Module) -> Report | None:
    """What the last calibrated `quantize` of a model did: route, scale groups, coverage of experts, notes."""
    return _reports.get(model)


def _drawn(calibration: Any, tokenizer: Any, rules: Recipe, *, samples: int, window: int, seed: int) -> Sequence[Any]:
    """The calibration batches: one is enough where it only serves to find weights."""
    if calibration is None:
        return ()
    needs_all = any(rule.method is not None and not rule.is_data_free for rule in rules)
    return batches(calibration, tokenizer, window=window, limit=samples if needs_all else 1, seed=seed)


def _quantize_alone(work: Work, advance: Callable[[str, float, float], None]) -> dict[str, QuantTensor]:
    """Quantize weights from their values alone, and put them in place once all are done."""
    quantized = {}
    for done, (site, rule) in enumerate(work):
        advance(f"quantizing {site.name}", done, len(work))
        quantized[site.name] = quantize_site(site, rule)
    for site, _ in work:
        site.replace(quantized[site.name])
    return quantized


def _auto(
    model: nn.Module, calibration: Any, request: Mapping[str, Any], advance: Callable[[str, float, float], None]
) -> Recipe:
    """The recipe that `ptqc.auto` chooses. request: its arguments, those that were not given left out."""
    if calibration is None:
        raise PtqcError("auto measures what weights are worth on calibration data; pass calibration=...")
    given = {name: value for name, value in request.items() if value is not None}
    unknown = sorted(set(given) - set(inspect.signature(auto).parameters))
    if unknown:
        raise PtqcError(f"auto has no option {', '.join(unknown)}; known: bits, base, candidates, group_size, measure")
    wrong = wrong_option(auto, given)
    if wrong is not None:
        raise PtqcError(f"auto: {wrong[1]}")
    return auto(model, calibration, **given, on_step=advance)


def _numel(value: object) -> int:
    return value.numel() if isinstance(value, torch.Tensor) and not value.is_floating_point() else 0


def _console() -> Console:
    return Console(stderr=True)


@contextmanager
def _shown(progress: bool) -> Iterator[Callable[[str, float, float], None]]:
    """A bar on stderr that shows what is being done; nothing without `progress`."""
    if not progress:
        yield lambda what, done, total: None
        return
    columns = (BarColumn(bar_width=24), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=_console(), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _nothing_to_do(model: nn.Module, skipped: Sequence[Skipped]) -> str:
    if any(isinstance(weight, QuantTensor) for weight in model.parameters()):
        return "every weight that may be quantized already is; start from the float model"
    return nothing_to_do(skipped)


def _report(
    before: int, quantized: Sequence[QuantTensor], skipped: Sequence[Skipped], report: Report | None, progress: bool
) -> None:
    specs = Counter(str(weight.spec) for weight in quantized)
    after = sum(weight.nbytes for weight in quantized)
    kinds = ", ".join(f"{count} x {name}" for name, count in specs.most_common())
    lines = [f"quantized {len(quantized)} weights ({kinds}): {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB"]
    for reason, count in Counter(entry.reason for entry in skipped).items():
        lines.append(f"  {count} left in float: {reason}")
    if report is not None:
        groups = ", ".join(f"{count} {done}" for done, count in report.counts.items())
        lines.append(f"  captured as {report.route}" + (f"; scale groups: {groups}" if groups else ""))
        lines += [f"  {line}" for line in report.notes]
    if progress:
        for line in lines:
            _console().print(line, highlight=False, markup=False)
    for line in lines:
        log.info(line)
