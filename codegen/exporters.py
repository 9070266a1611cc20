"""Exporters: what a file format must provide, and the driver that leaves a whole file or none.

A format is one file in `codegen/export/`: a frozen dataclass whose fields are its options, registered under the name
of the file. The driver asks it about every weight before any byte is written, lets it write into a folder beside the
target, and renames what it wrote into place.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from ptqc.errors import ExportError
from ptqc.option_types import wrong_option
from ptqc.registry import Registry
from ptqc.scratch import hidden, hold, shortage, sweep

__all__ = [
    "EXPORTERS", "ExportReport", "ExportedTensor", "Exporter", "Fate", "OnProgress", "ReadRows",
    "StreamingExporter", "Written", "export", "is_streaming", "require_space",
]  # fmt: skip

log = logging.getLogger("ptqc")

ReadRows = Callable[[str, int, int], Tensor]
"""(name of a parameter, start, stop) -> these rows of it as a matrix [all other axes, last axis]."""

OnProgress = Callable[[int, int, str], None]
"""Called with the bytes that are done, the bytes there are, and the tensor that they belong to."""

Fate = Literal["lossless", "converted", "requantized"]
"""lossless: the file holds the model's codes and scales, or its very numbers. converted: a float weight in a type that
rounds it. requantized: a stored weight whose grid the file's type does not have, decoded and encoded anew."""


@dataclass(frozen=True)
class ExportedTensor:
    """One weight in the file. name: in the model; stored_name, stored_as: name and type in the file."""

    name: str
    stored_name: str
    stored_as: str
    fate: Fate
    nbytes: int


@dataclass(frozen=True)
class Written:
    """What an exporter wrote. notes: whatever the reader of the file will do differently from the model."""

    tensors: tuple[ExportedTensor, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """What `export` did. nbytes: of all files written."""

    path: Path
    format: str
    nbytes: int
    tensors: tuple[ExportedTensor, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        kinds = Counter((tensor.stored_as, tensor.fate) for tensor in self.tensors)
        counts = ", ".join(f"{count} {kind} {fate}" for (kind, fate), count in sorted(kinds.items()))
        return "\n  ".join([f"{self.path} ({self.format}, {self.nbytes / 1e6:.1f} MB): {counts}", *self.notes])


class Exporter(Protocol):
    """A file format."""

    suffix: ClassVar[str]
    """Ending of its file names, with the dot."""

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """None if the format can hold this weight (perhaps a QuantTensor), else the reason and what would work."""
        ...

    def prepare(self, model: nn.Module, tokenizer: Any) -> Callable[[Path], Written]:
        """Check everything that can be checked without writing, and return the function that writes.

        Raises: ExportError if the format cannot hold the model.
        """
        ...


@runtime_checkable
class StreamingExporter(Exporter, Protocol):
    """A file format that is written from a model on the meta device, some rows of a weight at a time."""

    def prepare_streamed(
        self, model: nn.Module, tokenizer: Any, read: ReadRows | None, on_progress: OnProgress
    ) -> Callable[[Path], Written]:
        """As `prepare`; `read` gives the values of float parameters and buffers, None if `model` has them."""
        ...


EXPORTERS: Registry[type[Exporter]] = Registry("exporter", "ptqc.codegen.export")


def is_streaming(format: str) -> bool:
    """Whether a format is written from a model whose values are elsewhere.

    Raises: UnknownNameError; ExportError if a package is missing.
    """
    return hasattr(_kind(format), "prepare_streamed")


def export(
    model: nn.Module,
    format: str,
    path: str | os.PathLike[str],
    *,
    quant: str | None = None,
    tokenizer: Any = None,
    read: ReadRows | None = None,
    on_progress: OnProgress = lambda done, total, name: None,
    **options: Any,
) -> ExportReport:
    """Write a model to a file that other programs run.

    format: a name that `EXPORTERS.names()` lists. quant: how the format should store the weights, where it has a
    choice. tokenizer: a tokenizer, or its folder, where the format holds one. read: the values of a model on the meta
    device, and on_progress: where writing is, for formats that stream. options: fields of the exporter.
    The model is not changed. Nothing is left behind if anything fails.

    Example: `ptqc.export(model, "gguf", "model.gguf", quant="Q4_0", tokenizer="./model")`.

    Raises: ExportError if the format cannot hold the model, or the file cannot be written; UnknownNameError.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module
    exporter = _make(format, {"quant": quant, **options} if quant is not None else options)
    target = _target(Path(path), exporter.suffix)
    _ask(exporter, model, format, is_read=read is not None)
    if isinstance(exporter, StreamingExporter):
        write = exporter.prepare_streamed(model, tokenizer, read, on_progress)
    else:
        assert read is None, f"{format} does not stream"
        write = exporter.prepare(model, tokenizer)
    with staged_file(target) as temporary:
        written = write(temporary)
        nbytes = sum(file.stat().st_size for file in temporary.parent.rglob("*") if file.is_file())
    report = ExportReport(target, format, nbytes, written.tensors, written.notes)
    log.info("%s", report)
    return report


def _kind(format: str) -> type[Exporter]:
    try:
        return EXPORTERS.get(format)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "ptqc":
            raise
        raise ExportError(
            f'format "{format}" needs the package {error.name}, which is not installed: pip install "ptqc[{format}]"'
        ) from error


def _make(format: str, options: dict[str, Any]) -> Exporter:
    kind = _kind(format)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ExportError(f'format "{format}" has no option {unknown[0]!r}; its options: {", ".join(known) or "none"}')
    wrong = wrong_option(kind, options)
    if wrong is not None:
        raise ExportError(f'format "{format}": {wrong[1]}')
    return kind(**options)


def _target(path: Path, suffix: str) -> Path:
    if path.is_dir():
        raise ExportError(f'"{path}" is a folder; name a file, for example {path / ("model" + suffix)}')
    if not path.parent.is_dir():
        raise ExportError(f'cannot write "{path}": the folder "{path.parent}" does not exist')
    return path


def _ask(exporter: Exporter, model: nn.Module, format: str, is_read: bool) -> None:
    """Ask about every weight. Raises: ExportError naming those refused."""
    refused = []
    for name, weight in model.named_parameters():
        is_empty = weight.is_meta and not is_read
        reason = "it is on the meta device and holds no values" if is_empty else exporter.refuses(name, weight)
        if reason is not None:
            refused.append(f'"{name}": {reason}')
    if refused:
        more = f" (and {len(refused) - 3} more weights)" if len(refused) > 3 else ""
        raise ExportError(f"{format} cannot hold this model: {'; '.join(refused[:3])}{more}")


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """A path of the same name in a new folder beside `target`; what was written there is renamed into place at the end.

    Files beside it in that folder go along, before it. On any failure the folder is removed; what a killed run left,
    the next one removes.

    Raises: ExportError for operating-system errors, naming the target.
    """
    folder, lock = hidden(target), None
    try:
        sweep(target)
        folder.mkdir()
        lock = hold(folder)
        yield folder / target.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
            os.replace(file, target.parent / file.name)
    except OSError as error:
        raise ExportError(f'cannot write "{target}": {error.strerror or error}') from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def require_space(path: Path, needed: int) -> None:
    """Refuse to begin a file of `needed` bytes on a disk that cannot hold it. Raises: ExportError."""
    reason = shortage(path, needed)
    if reason is not None:
        raise ExportError(reason)
