"""The door to every export: `ptqc.export` for files (`ptqc.codegen.export`) and folders (`ptqc.codegen.dialects`)."""

import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from ptqc.channel_importance import importance
from ptqc.codegen.dialect import DIALECTS
from ptqc.codegen.exporters import EXPORTERS, ExportReport, ReadRows, is_streaming
from ptqc.codegen.exporters import export as export_file
from ptqc.errors import ExportError, UnknownNameError, first_line
from ptqc.folders.checkpoint import load
from ptqc.folders.exporting import export_folder
from ptqc.folders.folder import open_folder
from ptqc.folders.origins import of_folder, of_model
from ptqc.folders.rows import open_unread
from ptqc.option_types import wrong_option

__all__ = ["export", "formats", "is_folder"]

log = logging.getLogger("ptqc")

_FOLDER_OPTIONS = ("is_fused", "max_shard_bytes", "on_progress", "overwrite")
_OF_READERS = ("bits", "acts")
"""Fields of dialects that say what a folder has which is read."""


def formats() -> list[str]:
    """Every name of a format."""
    return sorted({*EXPORTERS.names(), *(name.replace("_", "-") for name in DIALECTS.names())})


def is_folder(format: str) -> bool:
    """Whether a format is a folder.

    Raises: UnknownNameError naming the formats there are.
    """
    if format.replace("_", "-") not in formats() and format not in EXPORTERS.names():
        raise UnknownNameError(f"no format is called {format!r}; known: {', '.join(formats())}")
    return format.replace("-", "_") in DIALECTS.names()


def export(
    model: nn.Module | str | os.PathLike[str],
    format: str,
    path: str | os.PathLike[str],
    *,
    quant: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    calibration: Any = None,
    samples: int = 128,
    window: int = 512,
    seed: int = 0,
    **options: Any,
) -> ExportReport:
    """Write a model for other programs to run.

    model: a module, or a model folder. A folder is read one tensor at a time where the format is a folder too, and a
    folder of floats some rows at a time for gguf, unless there is calibration data, on which the model is run.
    format: a name that `formats()` lists. quant: how the format should store the weights: a type of a gguf file; for
    folders "nearest" or a spec, see `ptqc.folders.exporting.export_folder`. tokenizer: a tokenizer, or its folder,
    where the format holds one. calibration: data from which a format that searches scales (gguf) learns which input
    channels matter (`ptqc.importance`); samples, window, seed: of it. options: of the format; folders
    also take overwrite, max_shard_bytes, is_fused and on_progress.
    The model is not changed. Nothing is left behind if anything fails.

    Example: `ptqc.export(model, "gptq", "model-gptq")`, `ptqc.export(model, "gguf", "model.gguf", quant="Q4_K_M")`.

    Raises: ExportError if the format cannot hold the model, or a file cannot be written; CheckpointError for a folder
    that cannot be read or written; UnknownNameError.
    """
    if not is_folder(format):
        if tokenizer is None and not isinstance(model, nn.Module):
            tokenizer = str(model)
        given, read = _opened(model, format, trust_remote_code, is_run=calibration is not None)
        if calibration is not None:
            if options.get("importance") is not None:
                raise ExportError("give calibration data or importance, not both")
            options["importance"] = importance(
                given, calibration, _loaded(tokenizer), samples=samples, window=window, seed=seed
            )
        return export_file(given, format, path, quant=quant, tokenizer=tokenizer, read=read, **options)
    if calibration is not None:
        raise ExportError(f"{format} stores weights as they are and reads no calibration data; quantize with it first")
    name = format.replace("-", "_")
    known = [field.name for field in fields(DIALECTS.get(name)) if field.name not in _OF_READERS]  # type: ignore[arg-type]
    unknown = sorted(options.keys() - {*known, *_FOLDER_OPTIONS})
    if unknown:
        raise ExportError(
            f'format "{format}" has no option {unknown[0]!r}; its options: {", ".join([*known, *_FOLDER_OPTIONS])}'
        )
    wrong = wrong_option(DIALECTS.get(name), options) or wrong_option(export_folder, options)
    if wrong is not None:
        raise ExportError(f'format "{format}": {wrong[1]}')
    if isinstance(model, nn.Module):
        origin = of_model(getattr(model, "_orig_mod", model))  # torch.compile wraps the module
    else:
        origin = of_folder(open_folder(model), trust_remote_code)
    tokenizer = _loaded(tokenizer, trust_remote_code)
    return export_folder(origin, name, Path(path), quant=quant, tokenizer=tokenizer, **options)


def _opened(
    model: nn.Module | str | os.PathLike[str], format: str, trust_remote_code: bool, is_run: bool
) -> tuple[nn.Module, ReadRows | None]:
    """A model with its values; or one without, and the function that reads them. is_run: it must have its values."""
    if isinstance(model, nn.Module):
        return model, None
    if is_streaming(format) and not is_run and not Path(model).is_file():
        stored = open_folder(model)
        unread = open_unread(stored, trust_remote_code)
        if not isinstance(unread, str):
            return unread.model, unread.read
        log.info("%s: %s; loading the whole model instead of some rows at a time", stored.path, unread)
    return load(model, trust_remote_code=trust_remote_code).eval(), None


def _loaded(tokenizer: Any, trust_remote_code: bool = False) -> Any:
    """A tokenizer where its folder was given."""
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer  # here: most exports need none

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f'no tokenizer could be read from "{tokenizer}": {first_line(error)}') from error
