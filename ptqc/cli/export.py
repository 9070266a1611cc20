"""`ptqc export`: a file or folder that other programs run."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ptqc.cli._models import Model, TrustRemoteCode, be_quiet
from ptqc.cli._options import Options, read_options
from ptqc.cli._output import Json, emit, progress
from ptqc.errors import PtqcError

__all__ = ["export"]

Format = Annotated[str, typer.Argument(metavar="FORMAT", help="gguf, onnx, gptq, awq, compressed-tensors, ...")]
Quant = Annotated[
    str | None,
    typer.Option(help="How the format stores the weights: a type of gguf (Q4_0); for folders a spec or nearest."),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text that says which input channels matter (gguf): docs, code, a file, a data set."),
]
Samples = Annotated[int, typer.Option(help="Windows of calibration text to use.", min=1)]
Window = Annotated[int, typer.Option(help="Tokens of a window of calibration text.", min=1)]
Out = Annotated[Path, typer.Option(help="The file, or for formats that are folders the folder, to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


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
    """Write a model in another format. Folders, and gguf from folders of floats, are written one tensor at a time."""
    from ptqc.exports import export as write
    from ptqc.exports import formats, is_folder
    from ptqc.folders.folder import local_folder
    from ptqc.folders.staging import refuse_target

    if format not in formats():
        raise PtqcError(f"no format is called {format!r}; known: {', '.join(formats())}")
    options: dict[str, Any] = {"quant": quant, **read_options(option)}
    if calibration is not None:
        options |= {"calibration": calibration, "samples": samples, "window": window}
    if is_folder(format):
        refuse_target(out.resolve(), overwrite)
        with progress(f"writing {out}", "bytes") as advance:
            report = write(
                local_folder(model), format, out, overwrite=overwrite, trust_remote_code=trust_remote_code,
                on_progress=advance, **options,
            )  # fmt: skip
    else:
        if out.exists() and not overwrite:
            raise PtqcError(f"{out} exists; add --overwrite or name another file")
        be_quiet()
        source = model if Path(model).is_file() else local_folder(model)
        with progress(f"writing {out}", "bytes") as advance:
            report = write(source, format, out, trust_remote_code=trust_remote_code, on_progress=advance, **options)
    document = asdict(report) | {"path": str(report.path), "quant": quant}
    emit(document, lambda: typer.echo(str(report)), is_json)
