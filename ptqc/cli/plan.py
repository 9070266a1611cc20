"""`ptqc plan`: what quantizing a model would do, without doing it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptqc.cli._models import Model, TrustRemoteCode, load_tokenizer
from ptqc.cli._options import Options, read_options
from ptqc.cli._output import Json, emit, printable, show_table, table
from ptqc.cli.quantize import (
    Activation,
    Bits,
    Calibration,
    Exclude,
    GroupSize,
    Include,
    Method,
    RecipeFile,
    Samples,
    Spec,
    Window,
)
from ptqc.errors import PtqcError

if TYPE_CHECKING:
    from ptqc.planned import Plan

__all__ = ["plan"]

All = Annotated[bool, typer.Option("--all", help="List every weight, group and skipped matrix by name.")]


def plan(
    model: Model,
    method: Method = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    spec: Spec = None,
    activation: Activation = None,
    option: Options = None,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    window: Window = 512,
    is_all: All = False,
    trust_remote_code: TrustRemoteCode = False,
    is_json: Json = False,
) -> None:
    """Show what quantize would do with the same options.

    Weights and formats, scale groups and why some cannot be folded, what stays in float and why, and estimates of size,
    memory and time. No weight is read.
    """
    from ptqc.plan import plan as make_plan

    tokenizer = load_tokenizer(model, trust_remote_code) if calibration is not None else None
    made = make_plan(
        _source(model), method, bits=bits, group_size=group_size, spec=spec, activation=activation, recipe=recipe,
        include=include, exclude=exclude, calibration=calibration, tokenizer=tokenizer, samples=samples, window=window,
        trust_remote_code=trust_remote_code, **read_options(option),
    )  # fmt: skip
    emit({"model": model} | made.to_json(), lambda: _show(made, is_all), is_json)
    if made.is_empty:
        reasons = Counter(entry.reason for entry in made.skipped).most_common(3)
        said = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "the model has no matrices"
        raise PtqcError(f"nothing would be quantized ({said})")


def _source(model: str) -> str | Path:
    return Path(model) if Path(model).exists() else model


def _show(made: Plan, is_all: bool) -> None:
    _show_weights(made, is_all)
    _show_groups(made, is_all)
    lines = made.short().splitlines()
    skipped = table("in float>", "why") if not is_all else table("in float", "why")
    if is_all:
        for entry in made.skipped:
            skipped.add_row(printable(entry.name), entry.reason)
    else:
        for reason, count in Counter(entry.reason for entry in made.skipped).most_common():
            skipped.add_row(str(count), reason)
    show_table(skipped, *lines)


def _show_weights(made: Plan, is_all: bool) -> None:
    """One row for weights of one kind: the numbers in their names left out."""
    rows: dict[tuple[str, ...], list[int]] = {}
    for weight in made.weights:
        name = weight.name if is_all else _kind(weight.name)
        shape = " x ".join(map(str, weight.shape))
        key = (printable(name), shape, weight.method, weight.spec, weight.activation)
        rows.setdefault(key, []).append(weight.nbytes)
    made_table = table("weight", "count>", "shape>", "method", "format", "inputs", "kB>")
    for (name, shape, method, spec, activation), sizes in rows.items():
        made_table.add_row(name, str(len(sizes)), shape, method, spec, activation, f"{sum(sizes) / 1e3:.1f}")
    show_table(made_table)


def _show_groups(made: Plan, is_all: bool) -> None:
    rows: dict[tuple[str, ...], int] = {}
    for group in made.groups:
        producers, consumers = _names(group.producers, is_all), _names(group.consumers, is_all)
        key = (group.kind, group.structure, producers or "-", consumers, group.reason or "-")
        rows[key] = rows.get(key, 0) + 1
    if not rows:
        return
    made_table = table("scale group", "count>", "structure", "from", "to", "why not folded")
    for (kind, *rest), count in rows.items():
        made_table.add_row(kind, str(count), *rest)
    show_table(made_table)


def _names(names: tuple[str, ...], is_all: bool) -> str:
    shown = [printable(name if is_all else _last(name)) for name in names]
    return ", ".join(dict.fromkeys(shown))


def _kind(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _last(name: str) -> str:
    """The name of the module, "q_proj" of "layers.0.q_proj.weight"."""
    parts: list[Any] = [part for part in name.split(".") if part not in ("weight", "bias")]
    return str(parts[-1]) if parts else name
