"""`ptqc quantize`: a model folder in, a quantized model folder out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

__all__ = [
    "Activation", "Bits", "Calibration", "Exclude", "GroupSize", "Include", "Method", "RecipeFile", "Samples", "Spec",
    "Window", "quantize",
]  # fmt: skip

Method = Annotated[
    str | None,
    typer.Option(
        help="A name that `ptqc methods` lists; transforms go first, as in smoothquant+gptq; auto chooses bits."
    ),
]
Bits = Annotated[
    float | None, typer.Option(help="Bits of a code: 1.58 (ternary), 2, 3, 4, 5, 6, 8; the mean with --method auto.")
]
GroupSize = Annotated[int | None, typer.Option(help="Weights that share a scale; -1 for the whole row.")]
Spec = Annotated[str | None, typer.Option(help="The exact format instead of bits and group size, as in nf4g64dq.")]
Activation = Annotated[str | None, typer.Option(help="What is done to inputs at run time, as in int8-token.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="YAML rules (pattern, method, spec ...) instead.")]
Include = Annotated[list[str] | None, typer.Option(help="Only weights that match: a glob, or re:<regex>. Repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave weights that match in float. Repeatable.")]
Calibration = Annotated[str | None, typer.Option(help="Example text: docs, code, or a .txt, .jsonl or .parquet file.")]
Samples = Annotated[int, typer.Option(help="Windows of calibration text to use.", min=1)]
Window = Annotated[int, typer.Option(help="Tokens of a window of calibration text.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the draw of windows.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there already.")]

_AUTO = "auto"


def quantize(
    model: Model,
    out: Out,
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
    seed: Seed = 0,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    is_json: Json = False,
) -> None:
    """Quantize a model on disk.

    The model is never in memory as a whole where it can be cut; a calibrated run that was killed goes on where it was.
    """
    from ptqc.recipe import requested_rules

    request: dict[str, Any] = {"bits": bits, "group_size": group_size, "spec": spec, "activation": activation}
    request["options"] = read_options(option) or None
    if (method is None) == (recipe is None):
        raise PtqcError("give either --method or --recipe")
    given = [f"--{name.replace('_', '-')}" for name, value in request.items() if value is not None]
    if recipe is not None and given:
        raise PtqcError(f"a recipe says everything itself; drop {', '.join(given)}")
    rules = None if method == _AUTO else requested_rules(method, recipe, request)
    needy = [_AUTO] if rules is None else sorted({rule.label for rule in rules if _wants_data(rule)})
    if needy and calibration is None:
        raise PtqcError(f"{', '.join(needy)} needs calibration data; add --calibration docs, or a file")
    started = time.perf_counter()
    place = _Place(model, out, overwrite, device, trust_remote_code)
    if calibration is None and rules is not None:
        document = _stream(place, rules, include, exclude)
    elif rules is not None and device in ("auto", "cpu"):
        drawn = _Data(str(calibration), samples if needy else 1, window, seed)
        document = _calibrated(place, rules, include, exclude, drawn)
    else:
        data = {"calibration": calibration, "samples": samples, "window": window, "seed": seed}
        chosen = {"include": include, "exclude": exclude} | data
        document = _in_memory(place, chosen | ({"recipe": rules} if rules else {"method": _AUTO} | _auto(request)))
    document["seconds"] = time.perf_counter() - started
    emit(document, lambda: _show(document), is_json)


def _wants_data(rule: Any) -> bool:
    return rule.method is not None and not rule.is_data_free


def _auto(request: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a request for `auto`, its options among them."""
    given = {name: value for name, value in request.items() if value is not None}
    options: dict[str, Any] = given.pop("options", {})
    return given | options


@dataclass(frozen=True)
class _Place:
    """Where a model comes from and goes to."""

    model: str
    out: Path
    overwrite: bool
    device: str
    trust_remote_code: bool


def _stream(
    place: _Place, rules: Recipe, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Any]:
    from ptqc.folders.staging import refuse_target
    from ptqc.folders.stream import quantize_folder

    refuse_target(place.out.resolve(), place.overwrite)
    _say_plan(place, rules, include, exclude)
    with progress("quantizing", "bytes") as advance:
        report = quantize_folder(
            place.model, place.out, recipe=rules, include=include, exclude=exclude, overwrite=place.overwrite,
            on_progress=advance, trust_remote_code=place.trust_remote_code,
        )  # fmt: skip
    return _document(place.out, report.weights, report.skipped, report.source_bytes)


def _say_plan(
    place: _Place,
    rules: Recipe,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    data: _Data | None = None,
) -> None:
    """Say on stderr what is going to be done."""
    from ptqc.plan import plan

    scales = (transform.has_scale for rule in rules for transform in rule.transforms)
    size: dict[str, Any] = {} if data is None else {"samples": data.samples, "window": data.window}
    made = plan(
        Path(place.model) if Path(place.model).exists() else place.model, recipe=rules, include=include,
        exclude=exclude, with_groups=any(scales), trust_remote_code=place.trust_remote_code, **size,
    )  # fmt: skip
    for line in made.short().splitlines():
        note(line)


@dataclass(frozen=True)
class _Data:
    """Which calibration data to draw."""

    source: str
    samples: int
    window: int
    seed: int


def _calibrated(
    place: _Place, rules: Recipe, include: Sequence[str] | None, exclude: Sequence[str] | None, data: _Data
) -> dict[str, Any]:
    from ptqc.calibrate import batches
    from ptqc.folders.calibrated import quantize_folder_calibrated
    from ptqc.folders.finished import refuse_output

    refuse_output(place.out.resolve(), place.overwrite)
    tokenizer = load_tokenizer(place.model, place.trust_remote_code)
    drawn = batches(data.source, tokenizer, window=data.window, limit=data.samples, seed=data.seed)
    _say_plan(place, rules, include, exclude, data)
    with progress("quantizing", "bytes") as advance:
        report = quantize_folder_calibrated(
            place.model, place.out, recipe=rules, batches=drawn, include=include, exclude=exclude,
            overwrite=place.overwrite, on_progress=advance, trust_remote_code=place.trust_remote_code,
        )  # fmt: skip
    return _document(place.out, report.weights, report.skipped, report.source_bytes)


def _in_memory(place: _Place, options: dict[str, Any]) -> dict[str, Any]:
    from ptqc.api import quantize as quantize_model
    from ptqc.folders.checkpoint import save
    from ptqc.folders.folder import open_folder
    from ptqc.folders.manifest import manifest_of
    from ptqc.folders.safefile import layout_bytes
    from ptqc.folders.staging import refuse_target

    refuse_target(place.out.resolve(), place.overwrite)
    tokenizer = load_tokenizer(place.model, place.trust_remote_code)
    loaded = load_model(place.model, place.device, trust_remote_code=place.trust_remote_code)
    quantize_model(loaded, tokenizer=tokenizer, **options)
    note(f"writing {place.out}")
    save(loaded, place.out, tokenizer=tokenizer, overwrite=place.overwrite)
    weights = manifest_of(dict(loaded.named_parameters())).weights
    return _document(place.out, weights, (), layout_bytes(open_folder(place.model).layout))


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
