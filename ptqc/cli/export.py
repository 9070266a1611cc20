"""`ptqc export`: a file that other programs run."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ptqc.cli._models import Model, TrustRemoteCode, load_model
from ptqc.cli._options import Options, read_options
from ptqc.cli._output import Json, emit, note
from ptqc.errors import PtqcError

__all__ = ["export"]

Format = Annotated[str, typer.Argument(metavar="FORMAT", help="gguf, onnx, ...")]
Quant = Annotated[str | None, typer.Option(help="How the format stores the weights, as in Q4_0 or Q8_0 for gguf.")]
Calibration = Annotated[
    str | None, typer.Option(help="Text that says which input channels matter: docs, code, a file, a data set.")
]
Samples = Annotated[int, typer.Option(help="Windows of calibration text to use.", min=1)]
Window = Annotated[int, typer.Option(help="Tokens of a window of calibration text.", min=1)]
Out = Annotated[Path, typer.Option(help="The file to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")]


def export(
    model: Model,
    format: Format,
    out: Out,
    quant: Quant = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    window: Window = 512,
    option: Options = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    is_json: Json = False,
) -> None:
    """Write a model to a file of another format."""
    from ptqc.codegen.exporters import EXPORTERS
    from ptqc.exporting import export as write
    from ptqc.folders.folder import local_folder

    if format not in EXPORTERS.names():
        raise PtqcError(f"no format is called {format!r}; known: {', '.join(EXPORTERS.names())}")
    if out.exists() and not overwrite:
        raise PtqcError(f"{out} exists; add --overwrite or name another file")
    note(f"loading {model}")
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    note(f"writing {out}")
    report = write(
        loaded, format, out, quant=quant, tokenizer=str(local_folder(model)),
        calibration=calibration, samples=samples, window=window, **read_options(option),
    )  # fmt: skip
    document = asdict(report) | {"path": str(report.path), "quant": quant}
    emit(document, lambda: typer.echo(str(report)), is_json)
