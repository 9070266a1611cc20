"""The files of a comparison: results.csv, results.json, plot.png and index.html, all of them or none."""

import csv
import io
import json
import math
import os
import platform
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ptqc.comparison.compare import Comparison, Run
from ptqc.comparison.page import render
from ptqc.comparison.plot import to_png
from ptqc.errors import PtqcError

__all__ = ["FILES", "as_document", "check_folder", "to_csv", "write"]

FILES = ("results.csv", "results.json", "plot.png", "index.html")


def check_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """The folder to write to, before any work is done for it.

    Raises: PtqcError if its place cannot be written to, or it holds results that are not to be overwritten.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise PtqcError(f"{folder} is a file; name a folder for the results")
    held = [name for name in FILES if (folder / name).exists()]
    if held and not overwrite:
        raise PtqcError(f"{folder} already holds {', '.join(held)}; overwrite it (--overwrite) or name another folder")
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PtqcError(f"{nearest} cannot be written to; name a folder elsewhere for the results")
    return folder


def write(comparison: Comparison, folder: str | Path, overwrite: bool = False) -> Path:
    """Write the files of a comparison into a folder, made if it does not exist, and return the folder.

    Raises: PtqcError if the folder holds results already or cannot be written; nothing is left behind then.
    """
    folder = check_folder(folder, overwrite)
    contents = {
        "results.csv": to_csv(comparison).encode(),
        "results.json": (json.dumps(as_document(comparison), indent=1, allow_nan=False) + "\n").encode(),
        "plot.png": to_png(comparison),
        "index.html": render(comparison).encode(),
    }
    staging = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(4)}.tmp")
    try:
        staging.mkdir(parents=True)
        for name, content in contents.items():
            (staging / name).write_bytes(content)
        _put_in_place(staging, folder)
    except OSError as error:
        raise PtqcError(f"cannot write the results to {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(staging, folder)
        return
    for file in sorted(staging.iterdir()):
        os.replace(file, folder / file.name)


def _row(run: Run) -> dict[str, Any]:
    """One run without its layers, as a flat mapping."""
    result = run.evaluation
    return {
        "label": run.label,
        "method": run.method,
        "spec": run.spec,
        "bits_per_weight": run.bits_per_weight,
        "model_bytes": run.nbytes,
        "perplexity": _finite(result.perplexity),
        "kl": _finite(result.kl),
        "top1": result.top1,
        "tokens": result.tokens,
        "quantize_seconds": round(run.quantize_seconds, 3),
        "evaluate_seconds": round(result.seconds, 3),
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def to_csv(comparison: Comparison) -> str:
    """A table with a row for the float model and one for each run."""
    rows = [_row(run) for run in (comparison.baseline, *comparison.runs)]
    buffer = io.StringIO()
    table = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return buffer.getvalue()


def as_document(comparison: Comparison) -> dict[str, Any]:
    """Everything a comparison found, ready for JSON: how it was made, the rows, and the error of every layer."""
    runs = [_row(run) | {"layers": [asdict(layer) for layer in run.layers]} for run in comparison.runs]
    return {
        "model": comparison.model,
        "text": comparison.text,
        "window": comparison.window,
        "windows": comparison.windows,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "float": _row(comparison.baseline),
        "runs": runs,
    }
