"""`ptqc quantize`: a model folder in, a quantized model folder out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptqc.cli._models import Device, Model, TrustRemoteCode, load_model, load_tokenizer
from ptqc.cli._options import Options, read_options
from ptqc.cli._output import Json, emit, note, progress
from ptqc.errors import PtqcError

if TYPE_CHECKING:
    from ptqc.folders.manifest import StoredWeight
    from ptqc.recipe import Recipe
    from ptqc.sites import Skipped

__all__ = ["Exclude", "Include", "quantize"]

Method = Annotated[str | None, typer.Option(help="How to choose the codes: a name that `ptqc methods` lists.")]
Bits = Annotated[float | None, typer.Option(help="Bits of a code: 1.58 (ternary), 2, 3, 4, 5, 6, 8.")]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale; -1 for the whole row.")]
Spec = Annotated[str | None, typer.Option(help="The exact format instead of bits and group size, as in nf4g64dq.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML rules (pattern, method, spec ...) instead.")]
Include = Annotated[list[str] | None, typer.Option(help="Only weights that match: a glob, or re:<regex>. Repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave weights that match in float. Repeatable.")]
Calibration = Annotated[str | None, typer.Option(help="Example text: docs, code, or a .txt, .jsonl or .parquet file.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there already.")]


def quantize(
    model: Model,
    out: Out,
    method: Method = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    spec: Spec = None,
    option: Options = None,
    recipe: RecipeFile = None,
    include: Include = None,
    exclude: Exclude = None,
    calibration: Calibration = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    is_json: Json = False,
) -> None:
    """Quantize a model on disk.

    Where the method needs no calibration data, the model is never in memory as a whole.
    """
    from ptqc.recipe import load_recipe, make_rule

    request = {"bits": bits, "group_size": group_size, "spec": spec, "options": read_options(option) or None}
    if (method is None) == (recipe is None):
        raise PtqcError("give either --method or --recipe")
    given = [f"--{name.replace('_', '-')}" for name, value in request.items() if value is not None]
    if recipe is not None and given:
        raise PtqcError(f"a recipe says everything itself; drop {', '.join(given)}")
    rules = load_recipe(recipe) if recipe is not None else [make_rule("*", method, **request)]  # type: ignore[arg-type]
    needy = sorted({type(rule.method).__name__ for rule in rules if rule.method is not None and rule.method.needs})
    if needy and calibration is None:
        raise PtqcError(f"{', '.join(needy)} needs calibration data; add --calibration docs, or a file")
    started = time.perf_counter()
    if calibration is None:
        document = _stream(model, out, rules, include, exclude, overwrite, trust_remote_code)
    else:
        options = {"recipe": rules, "include": include, "exclude": exclude, "calibration": calibration}
        document = _in_memory(model, out, options, overwrite, device, trust_remote_code)
    document["seconds"] = time.perf_counter() - started
    emit(document, lambda: _show(document), is_json)


def _stream(
    model: str,
    out: Path,
    rules: Recipe,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    overwrite: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    from ptqc.folders.stream import quantize_folder

    with progress("quantizing", "bytes") as advance:
        report = quantize_folder(
            model, out, recipe=rules, include=include, exclude=exclude, overwrite=overwrite, on_progress=advance,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    return _document(out, report.weights, report.skipped, report.source_bytes)


def _in_memory(
    model: str, out: Path, options: dict[str, Any], overwrite: bool, device: str, trust_remote_code: bool
) -> dict[str, Any]:
    from ptqc.api import quantize as quantize_model
    from ptqc.folders.checkpoint import save
    from ptqc.folders.folder import open_folder
    from ptqc.folders.manifest import manifest_of
    from ptqc.folders.safefile import layout_bytes
    from ptqc.folders.staging import refuse_target

    refuse_target(out.resolve(), overwrite)
    tokenizer = load_tokenizer(model, trust_remote_code)
    loaded = load_model(model, device, trust_remote_code=trust_remote_code)
    quantize_model(loaded, tokenizer=tokenizer, **options)
    note(f"writing {out}")
    save(loaded, out, tokenizer=tokenizer, overwrite=overwrite)
    weights = manifest_of(dict(loaded.named_parameters())).weights
    return _document(out, weights, (), layout_bytes(open_folder(model).layout))


def _document(
    out: Path, weights: Mapping[str, StoredWeight], skipped: Sequence[Skipped], source_bytes: int
) -> dict[str, Any]:
    sizes = [weight.spec.nbytes(weight.shape) for weight in weights.values()]
    return {
        "out": str(out),
        "weights": len(weights),
        "formats": dict(Counter(str(weight.spec) for weight in weights.values()).most_common()),
        "bits_per_weight": 8 * sum(sizes) / sum(math.prod(weight.shape) for weight in weights.values()),
        "in_float": dict(Counter(entry.reason for entry in skipped).most_common()),
        "source_bytes": source_bytes,
        "bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }


def _show(document: Mapping[str, Any]) -> None:
    formats = ", ".join(f"{count} x {name}" for name, count in document["formats"].items())
    bits = document["bits_per_weight"]
    typer.echo(f"{document['weights']} weights quantized ({formats}), {bits:.4g} bits per weight")
    for reason, count in document["in_float"].items():
        typer.echo(f"{count} left in float: {reason}")
    before, after = document["source_bytes"] / 1e6, document["bytes"] / 1e6
    typer.echo(f"{document['out']}: {before:.1f} MB -> {after:.1f} MB in {document['seconds']:.1f} s")
