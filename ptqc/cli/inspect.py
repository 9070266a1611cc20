"""`ptqc inspect`: what is in a checkpoint, from headers and config alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptqc.cli._output import Json, emit, printable, show_table, table

if TYPE_CHECKING:
    from ptqc.folders.manifest import Manifest
    from ptqc.folders.safefile import Layout

__all__ = ["inspect"]

Checkpoint = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model folder, a .safetensors file, or organisation/name on the hub.")
]
All = Annotated[bool, typer.Option("--all", help="Also list tensors of one dimension (norms, biases).")]


@dataclass(frozen=True)
class _Entry:
    """A weight of the checkpoint. format: its spec, or its dtype."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int
    bits_per_weight: float
    is_quantized: bool


def inspect(model: Checkpoint, is_all: All = False, is_json: Json = False) -> None:
    """List what a checkpoint holds.

    Each weight, how it is stored, its bytes and bits per weight, and totals; from headers and config alone.
    """
    layout, manifest, foreign = _read(model)
    entries = list(_entries(layout, manifest))
    quantized = [entry for entry in entries if entry.is_quantized]
    document = {
        "model": model,
        "quantized_by": "ptqc" if quantized else foreign,
        "tensors": [asdict(entry) for entry in entries],
        "tied": dict(manifest.tied),
        "totals": {"all": _total(entries), "quantized": _total(quantized), "float": _total(_floats(entries))},
    }
    emit(document, lambda: _show(document, entries, is_all), is_json)


def _read(model: str) -> tuple[Layout, Manifest, str | None]:
    """Layout and manifest of a folder or file, and the name of the foreign program that quantized it."""
    from ptqc.folders.checkpoint import manifest_in
    from ptqc.folders.folder import open_folder
    from ptqc.folders.manifest import METHOD, Manifest
    from ptqc.folders.safefile import read_safefile

    if Path(model).is_file():
        entries = read_safefile(model).entries
        return {name: (entry.shape, entry.dtype) for name, entry in entries.items()}, Manifest(), None
    stored = open_folder(model)
    quantization = stored.config.get("quantization_config")
    foreign = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if foreign not in (None, METHOD):
        return stored.layout, Manifest(), str(foreign)
    return stored.layout, manifest_in(stored), None


def _entries(layout: Layout, manifest: Manifest) -> Iterator[_Entry]:
    """Weights in the order of their names, numbers in names counting as numbers."""
    parts = manifest.layout()
    plain = {name: _float_entry(name, *stored) for name, stored in layout.items() if name not in parts}
    stored = {
        name: _entry(name, str(weight.spec), weight.parameter_shape, weight.spec.nbytes(weight.shape), True)
        for name, weight in manifest.weights.items()
    }
    for name in sorted(plain | stored, key=_natural):
        yield (plain | stored)[name]


def _float_entry(name: str, shape: tuple[int, ...], dtype: Any) -> _Entry:
    return _entry(name, str(dtype).removeprefix("torch."), shape, math.prod(shape) * dtype.itemsize, False)


def _entry(name: str, format: str, shape: tuple[int, ...], nbytes: int, is_quantized: bool) -> _Entry:
    return _Entry(name, format, shape, nbytes, 8 * nbytes / max(1, math.prod(shape)), is_quantized)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _floats(entries: list[_Entry]) -> list[_Entry]:
    return [entry for entry in entries if not entry.is_quantized]


def _total(entries: list[_Entry]) -> dict[str, float]:
    count = sum(math.prod(entry.shape) for entry in entries)
    nbytes = sum(entry.nbytes for entry in entries)
    bits_per_weight = 8 * nbytes / max(1, count)
    return {"weights": len(entries), "parameters": count, "bytes": nbytes, "bits_per_weight": bits_per_weight}


def _show(document: dict[str, Any], entries: list[_Entry], is_all: bool) -> None:
    made = table("weight", "format", "shape>", "kB>", "bits/weight>")
    for entry in entries:
        if is_all or len(entry.shape) > 1 or entry.is_quantized:
            shape = " x ".join(map(str, entry.shape)) or "scalar"
            bits = f"{entry.bits_per_weight:.4g}"
            made.add_row(printable(entry.name), entry.format, shape, f"{entry.nbytes / 1e3:.1f}", bits)
    lines = [f"{alias} is tied to {name}" for alias, name in document["tied"].items()]
    if document["quantized_by"] not in (None, "ptqc"):
        lines.append(f"quantized by {document['quantized_by']}: tensors are listed as they are stored")
    lines += [
        f"{kind:<10}{total['weights']:>6} tensors {total['parameters'] / 1e6:>10.2f} M weights "
        f"{total['bytes'] / 1e6:>10.2f} MB {total['bits_per_weight']:>8.4g} bits/weight"
        for kind, total in document["totals"].items()
        if total["weights"]
    ]
    show_table(made, *lines)
