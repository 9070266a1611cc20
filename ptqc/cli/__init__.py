"""The `ptqc` command. Every command is a file of this package.

torch and transformers take seconds to import, so files here import them, and everything of ptqc that does, inside the
functions that need them: help and mistakes answer at once.

What a command was asked for goes to stdout, progress and messages to stderr. Exit codes: 0 done; 2 the request or a
file is at fault, said in one line; 130 interrupted; 1 with a traceback is a mistake of ours.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, cast

import typer

from ptqc import __version__
from ptqc.cli._output import note
from ptqc.cli.compare import compare
from ptqc.cli.evaluate import run_eval
from ptqc.cli.export import export
from ptqc.cli.generate import generate
from ptqc.cli.inspect import inspect
from ptqc.cli.methods import methods
from ptqc.cli.plan import plan
from ptqc.cli.quantize import quantize
from ptqc.errors import PtqcError

__all__ = ["app", "main"]

log = logging.getLogger("ptqc")

_INTERRUPTED = 130

# click's base of usage errors, found through typer, which has a copy of click inside since 0.20.
_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="ptqc",
    help="Post-training quantization: any model, any method, any target.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _function in {
    "quantize": quantize, "plan": plan, "eval": run_eval, "compare": compare, "inspect": inspect, "generate": generate,
    "export": export, "methods": methods,
}.items():  # fmt: skip
    app.command(_name)(cast(Callable[..., None], _function))


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"ptqc {__version__}")
        raise typer.Exit


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the time: a progress bar moves out of the way of what goes through it.

    What was said is not said again: a plan and what carries it out find the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._said:
            self._said.add(line)
            note(f"ptqc: {line}")


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log, and tracebacks of errors.")]
Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _prepare(
    is_verbose: Verbose = False,
    is_version: Version = False,
) -> None:
    log.handlers = [_Stderr()]
    log.setLevel(logging.INFO if is_verbose else logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. arguments: those of the process by default."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(words or ["--help"], standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except _UsageError as error:
        return _fail(error.format_message())
    except PtqcError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    if code == _INTERRUPTED:  # newer versions of typer return it instead of raising
        note("ptqc: interrupted")
    return code


def _fail(message: str) -> int:
    """Say in one line what is at fault."""
    if log.isEnabledFor(logging.INFO):
        traceback.print_exc()
    note(f"ptqc: {' '.join(message.split())}")
    return 2
