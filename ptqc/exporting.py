"""The door to exporting: what `ptqc.export` does before a format takes over."""

import os
from typing import Any

from torch import nn

from ptqc.channel_importance import importance
from ptqc.codegen.exporters import ExportReport
from ptqc.codegen.exporters import export as write
from ptqc.errors import ExportError

__all__ = ["export"]


def export(
    model: nn.Module,
    format: str,
    path: str | os.PathLike[str],
    *,
    quant: str | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int = 128,
    window: int = 512,
    seed: int = 0,
    **options: Any,
) -> ExportReport:
    """Write a model to a file that other programs run.

    format: a name that `ptqc methods` lists among the formats. quant: how the format should store the weights, where it
    has a choice. tokenizer: a tokenizer, or its folder, where the format holds one. calibration: data from which a
    format that searches scales learns which input channels matter (`ptqc.importance`); samples, window, seed: of it,
    see `ptqc.quantize`. options: of the format. The model is not changed. Nothing is left behind if anything fails.

    Example: `ptqc.export(model, "gguf", "model.gguf", quant="Q4_K_M", tokenizer="./model", calibration="docs")`.

    Raises: ExportError if the format cannot hold the model, or the file cannot be written; UnknownNameError.
    """
    if calibration is not None:
        if options.get("importance") is not None:
            raise ExportError("give calibration data or importance, not both")
        options["importance"] = importance(
            model, calibration, _loaded(tokenizer), samples=samples, window=window, seed=seed
        )
    return write(model, format, path, quant=quant, tokenizer=tokenizer, **options)


def _loaded(tokenizer: Any) -> Any:
    """A tokenizer where its folder was given."""
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    from transformers import AutoTokenizer  # here: exporting without calibration data needs none

    try:
        return AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f'no tokenizer could be read from "{tokenizer}": {str(error).splitlines()[0]}') from error
