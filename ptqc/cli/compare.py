"""`ptqc compare`: several methods on one model, as a table, a picture and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptqc.cli._models import Device, Model, TrustRemoteCode, load_model, load_tokenizer, read_tokens
from ptqc.cli._output import Json, emit, note, progress, show_table, table
from ptqc.cli.evaluate import Batch, Column, Dataset, Split, Text, Window, Windows
from ptqc.cli.quantize import Calibration, Exclude, Include
from ptqc.errors import PtqcError

if TYPE_CHECKING:
    from ptqc.comparison.compare import Comparison

__all__ = ["compare", "show_comparison"]

Methods = Annotated[str, typer.Option(help="method[:bits[:group]] or method:spec, with commas between.")]
Out = Annotated[Path, typer.Option(help="Folder for results.csv, results.json, plot.png and index.html.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")]


def compare(
    model: Model,
    out: Out,
    methods: Methods = "rtn:4,hqq:4,hqq:3,nf4,int8",
    text: Text = "docs",
    dataset: Dataset = None,
    split: Split = "test",
    column: Column = "text",
    window: Window = 512,
    windows: Windows = 24,
    batch: Batch = 4,
    include: Include = None,
    exclude: Exclude = None,
    calibration: Calibration = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    is_json: Json = False,
) -> None:
    """Compare methods on one model.

    Quantizes a copy of the model with each, scores them all on a text, and writes a table (CSV, JSON), a picture and a
    page that shows in any browser.
    """
    from ptqc.comparison.compare import compare as run
    from ptqc.comparison.compare import parse_candidates
    from ptqc.comparison.report import as_document, check_folder, write
    from ptqc.evaluate import windows_of

    candidates = parse_candidates(methods)
    needy = [candidate.label for candidate in candidates if not candidate.is_data_free]
    if needy and calibration is None:
        raise PtqcError(f"{', '.join(needy)} needs calibration data; add --calibration docs, or a file")
    check_folder(out, overwrite)
    tokenizer = load_tokenizer(model, trust_remote_code)
    limit = window * windows if windows else None
    tokens, name = read_tokens(tokenizer, text, dataset, split, column, limit)
    count = len(windows_of(tokens, window, windows or None))
    loaded = load_model(model, device, trust_remote_code=trust_remote_code)
    labels = ["float", *(candidate.label for candidate in candidates)]
    with progress("comparing", "windows") as advance:
        comparison = run(
            loaded, candidates, tokens, window=window, windows=windows or None, batch=batch, include=include,
            exclude=exclude, calibration=calibration, tokenizer=tokenizer, names=(model, name),
            on_step=lambda label, step, done, total: advance(
                labels.index(label) * count + done, len(labels) * count, f"{label} {step}"
            ),
        )  # fmt: skip
    write(comparison, out, overwrite)
    emit(as_document(comparison), lambda: show_comparison(comparison), is_json)
    note(f"wrote {out / 'index.html'}")


def show_comparison(comparison: Comparison) -> None:
    """Print a comparison as a table on stdout."""
    sizes, scores = ("bits/weight>", "model, MB>"), ("perplexity>", "KL, nats>", "same top token>")
    made = table("method", "format", *sizes, *scores, "seconds>")
    for run in (comparison.baseline, *comparison.runs):
        result = run.evaluation
        made.add_row(
            run.label, run.spec, f"{run.bits_per_weight:.4g}", f"{run.nbytes / 1e6:.1f}", f"{result.perplexity:.3f}",
            "-" if result.kl is None else f"{result.kl:.5f}",
            "-" if result.top1 is None else f"{100 * result.top1:.1f}%",
            f"{run.quantize_seconds:.1f}" if run.layers else "-",
        )  # fmt: skip
    show_table(made, f"{comparison.model} on {comparison.text}, {comparison.windows} windows of {comparison.window}")
