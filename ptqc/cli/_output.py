"""What the commands show: results on stdout (a table, or JSON alone), progress and everything else on stderr."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Protocol

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

__all__ = ["Advance", "Json", "Unit", "emit", "note", "printable", "progress", "show_table", "table"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Unit = Literal["bytes", "windows"]

_SECONDS_BETWEEN_LINES = 5.0
_LONGEST_NAME = 32
"""Characters of the thing at hand beside a bar, its last ones: the line must fit 100 columns."""


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: float, total: float, what: str = "") -> None:
        """done, total: in the unit of the bar. what: the thing at hand."""
        ...


def emit(document: Any, render: Callable[[], None], is_json: bool) -> None:
    """Print a result: as one JSON document, or as `render` shows it."""
    if is_json:
        typer.echo(json.dumps(document, indent=1, allow_nan=False))
    else:
        render()


def table(*heads: str, title: str | None = None) -> Table:
    """An empty table; a head that ends in ">" stands over numbers and is aligned right."""
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", header_style="bold", pad_edge=False)
    for head in heads:
        made.add_column(head.removesuffix(">"), justify="right" if head.endswith(">") else "left", overflow="fold")
    return made


def show_table(made: Table, *lines: str) -> None:
    """Print a table on stdout, and lines below it."""
    # No markup: cells hold names from files. A file has no edge to wrap at.
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(markup=False, highlight=False, emoji=False, width=200 if wide else None)
    console.print(made)
    for line in lines:
        console.print(printable(line), soft_wrap=True)


def note(line: str) -> None:
    """Print a line on stderr."""
    typer.echo(printable(line), err=True)


def printable(text: str) -> str:
    """The text without characters that move a terminal's cursor or change its colours: names come from files."""
    return "".join(character if character.isprintable() else "?" for character in text)


@contextmanager
def progress(what: str, unit: Unit) -> Iterator[Advance]:
    """Show a bar with the rate and the time left on stderr; a line now and then where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, unit)
        return
    bar = Progress(*_columns(unit), console=console, transient=True)
    with bar:
        task = bar.add_task(what, total=None, item="")

        def advance(done: float, total: float, what: str = "") -> None:
            bar.update(task, completed=done, total=total, item=escape(printable(what)[-_LONGEST_NAME:]))

        yield advance


def _columns(unit: Unit) -> Sequence[ProgressColumn]:
    amounts: dict[Unit, list[ProgressColumn]] = {
        "bytes": [DownloadColumn(), TransferSpeedColumn()],
        "windows": [MofNCompleteColumn(), TextColumn("windows")],
    }
    ends = [TimeRemainingColumn(), TextColumn("left [dim]{task.fields[item]}")]
    return [TextColumn("{task.description}"), BarColumn(bar_width=20), *amounts[unit], *ends]


class _Lines:
    """Progress as lines of text, a few seconds apart."""

    def __init__(self, what: str, unit: Unit) -> None:
        self._what, self._unit = what, unit
        self._started = self._shown = time.monotonic()

    def __call__(self, done: float, total: float, what: str = "") -> None:
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES or not done:
            return
        self._shown = now
        left = (now - self._started) * (total - done) / done
        note(f"{self._what} {what}: {self._amount(done, total, now)}, {left:.0f} s left".replace(" :", ":"))

    def _amount(self, done: float, total: float, now: float) -> str:
        if self._unit == "windows":
            return f"{done:.0f} of {total:.0f} windows"
        rate = done / max(now - self._started, 1e-9)
        return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s"
