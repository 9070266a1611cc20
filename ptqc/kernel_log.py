"""What became of every product of a compiled model: a line for each in the log, and a table.

The logger "ptqc.kernels" says for each site of each graph, at INFO: the weights, the request, the target that serves
it, why the targets asked before refuse, and what was not fused and why. With PTQC_LOGS=kernels in the environment these
lines go to stderr; PTQC_LOGS names loggers below "ptqc", separated by commas, or "all".
"""

import logging
import os
from collections.abc import Iterable, Iterator
from io import StringIO

from rich.console import Console
from rich.table import Table
from torch import nn

from ptqc.identity import WeightTable
from ptqc.pipeline import ChosenKernel, Site
from ptqc.qtensor import QuantTensor
from ptqc.stored import stored_forms

__all__ = ["chosen_kernels", "kernel_table", "log_as_asked", "note_kernels"]

log = logging.getLogger("ptqc.kernels")

_chosen: WeightTable[list[ChosenKernel]] = WeightTable()
"""First weight of a site -> its kernels, each once, whatever the number of graphs."""


def note_kernels(chosen: Iterable[tuple[Site, ChosenKernel]]) -> None:
    """Log the kernels of one graph and remember them for the table."""
    for site, kernel in chosen:
        log.info("%s", kernel)
        known = _chosen.setdefault(site.weights[0], [])
        if kernel not in known:
            known.append(kernel)


def chosen_kernels(model: nn.Module) -> list[ChosenKernel]:
    """Every product with a stored weight of `model` in the graphs compiled so far: its request and its kernel."""
    return [kernel for weight in _stored_in(model) for kernel in _chosen.get(weight, [])]


def kernel_table(model: nn.Module) -> str:
    """The kernels of a compiled model as a table: `print(ptqc.backend.kernel_table(model))`."""
    table = Table("weights", "request", "target", "asked before, not fused", show_lines=True)
    for kernel in chosen_kernels(model):
        asked = [f"{target}: {reason}" for target, reason in kernel.kernel.refusals]
        notes = "\n".join([*asked, *(f"not fused: {step}" for step in kernel.left)])
        table.add_row("\n".join(kernel.names), str(kernel.request), kernel.kernel.target, notes)
    text = StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue()


def _stored_in(model: nn.Module) -> Iterator[QuantTensor]:
    for parameter in model.parameters():
        yield from [parameter] if isinstance(parameter, QuantTensor) else stored_forms(parameter)


def log_as_asked() -> None:
    """Print the loggers that PTQC_LOGS names."""
    asked = [name.strip() for name in os.environ.get("PTQC_LOGS", "").split(",") if name.strip()]
    for name in asked:
        logger = logging.getLogger("ptqc" if name == "all" else f"ptqc.{name}")
        logger.setLevel(logging.INFO)
        if not any(getattr(handler, "is_from_environment", False) for handler in logger.handlers):
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
            handler.is_from_environment = True  # type: ignore[attr-defined]
            logger.addHandler(handler)
