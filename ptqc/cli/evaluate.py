"""`ptqc eval`: how well a model predicts a text, and how far it is from the float model."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from ptqc.cli._models import Device, Dtype, Model, TrustRemoteCode, load_model, load_tokenizer, read_tokens
from ptqc.cli._output import Json, emit, progress, show_table, table

__all__ = ["Batch", "Column", "Dataset", "Split", "Text", "Window", "Windows", "finite", "run_eval"]

Text = Annotated[str, typer.Option(help="A text file, or an embedded text: docs (English), code (Python).")]
Dataset = Annotated[str | None, typer.Option(help="A data set for the datasets library instead, name or name:config.")]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
Column = Annotated[str, typer.Option(help="Field with the text in a data set, .jsonl or .parquet file.")]
Window = Annotated[int, typer.Option(help="Tokens of a window; the first is not scored.", min=2)]
Windows = Annotated[int, typer.Option(help="Score at most this many windows; 0 scores all.", min=0)]
Batch = Annotated[int, typer.Option(help="Windows in one forward pass.", min=1)]
Against = Annotated[str | None, typer.Option(help="The float model to compare with: adds KL and top-1 agreement.")]


def run_eval(
    model: Model,
    text: Text = "docs",
    dataset: Dataset = None,
    split: Split = "test",
    column: Column = "text",
    against: Against = None,
    window: Window = 512,
    windows: Windows = 24,
    batch: Batch = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    is_json: Json = False,
) -> None:
    """Score a model on a text.

    Perplexity over windows that do not overlap; with --against also the KL divergence from the float model and the
    share of positions where both find the same token most likely.
    """
    from ptqc.evaluate import evaluate, windows_of

    limit = window * windows if windows else None
    tokens, name = read_tokens(load_tokenizer(model, trust_remote_code), text, dataset, split, column, limit)
    windows_of(tokens, window)  # a text that is too short is an error before any model is loaded
    scored = load_model(model, device, dtype, trust_remote_code)
    other = None if against is None else load_model(against, device, dtype, trust_remote_code)
    with progress("evaluating", "windows") as advance:
        found = evaluate(
            scored, tokens, window=window, windows=windows or None, against=other, batch=batch, on_progress=advance
        )
    count = found.tokens // (window - 1)
    document: dict[str, Any] = {"model": model, "text": name, "window": window, "windows": count, "against": against}
    document |= asdict(found) | {"perplexity": finite(found.perplexity), "kl": finite(found.kl)}

    def render() -> None:
        made = table("perplexity>", "KL, nats>", "same top token>", "tokens>", "seconds>")
        kl = "-" if found.kl is None else f"{found.kl:.5f}"
        top1 = "-" if found.top1 is None else f"{100 * found.top1:.1f}%"
        made.add_row(f"{found.perplexity:.4f}", kl, top1, str(found.tokens), f"{found.seconds:.1f}")
        show_table(made, f"{model} on {name}, {count} windows of {window}")

    emit(document, render, is_json)


def finite(value: float | None) -> float | None:
    """None for what JSON cannot say: infinity and NaN."""
    return value if value is not None and abs(value) < float("inf") else None
