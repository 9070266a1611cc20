"""The model, tokenizer and text that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptqc.errors import CheckpointError, PtqcError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "Device", "Dtype", "Model", "TrustRemoteCode", "be_quiet", "load_model", "load_tokenizer", "pick_device",
    "read_tokens",
]  # fmt: skip

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or organisation/name on the hub.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto is float32 on a CPU, else as stored.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")]

_DTYPES = ("float32", "float16", "bfloat16")


def pick_device(device: str) -> torch.device:
    """The device that is meant.

    Raises: PtqcError if there is no such device here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without CUDA
        raise PtqcError(f"no device {device!r} here: {str(error).splitlines()[0]}") from None


def load_model(
    source: str, device: str = "cpu", dtype: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder or hub repository, float or quantized. dtype: None leaves it as stored.

    Raises: PtqcError if it cannot be loaded, in one line.
    """
    import torch

    from ptqc.folders.checkpoint import load

    place = pick_device(device)
    if dtype is not None and dtype not in ("auto", *_DTYPES):
        raise PtqcError(f"no dtype is called {dtype!r}; use auto, {', '.join(_DTYPES)}")
    wanted = getattr(torch, dtype) if dtype in _DTYPES else None
    if dtype == "auto" and place.type == "cpu":
        wanted = torch.float32
    be_quiet()
    return load(source, dtype=wanted, device=place, trust_remote_code=trust_remote_code).eval()


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub repository.

    Raises: PtqcError if it has none.
    """
    from transformers import AutoTokenizer

    from ptqc.folders.folder import local_folder

    folder = local_folder(source)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the fields of a hostile tokenizer fail anywhere in transformers, in any way
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{source} has no tokenizer that transformers can load: {reason}") from error


def read_tokens(
    tokenizer: Any, text: str, dataset: str | None, split: str, column: str, limit: int | None
) -> tuple[Tensor, str]:
    """Token ids [tokens] of the text that the options name, and what to call it."""
    from ptqc.texts import read_dataset, read_documents, tokenize

    documents = read_documents(text, column) if dataset is None else read_dataset(dataset, split, column)
    name = Path(text).name if dataset is None else f"{dataset} ({split})"
    return tokenize("\n\n".join(documents), tokenizer, limit), name


def be_quiet() -> None:
    """Leave the terminal to our own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
