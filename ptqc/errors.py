"""Errors a user can act on: each says what was asked, what was found and what would work."""

import re

__all__ = ["CheckpointError", "ExportError", "PtqcError", "SpecError", "UnknownNameError", "WeightError", "first_line"]


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 1000
"""Letters of a message: names and values that a file announces may be of any length, and of any letters."""


class PtqcError(Exception):
    """Base of every error that ptqc raises on purpose. The command prints its text and exits with 2.

    option: the component and the option of it that is at fault, for those who know where it was written.
    """

    option: tuple[str, str] | None = None

    def __str__(self) -> str:
        text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in super().__str__())
        half = _LONGEST // 2
        return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


class SpecError(PtqcError, ValueError):
    """A weight spec that cannot be parsed, or that cannot hold the given shape."""


class WeightError(PtqcError, ValueError):
    """A weight whose values cannot be quantized (NaN, infinite, empty)."""


class UnknownNameError(PtqcError, LookupError):
    """A method, target, exporter or pass name that nothing registers."""


class CheckpointError(PtqcError, OSError):
    """A model folder or file that cannot be read or written."""


class ExportError(PtqcError):
    """A model that an export format cannot hold."""


def first_line(error: BaseException) -> str:
    """What to quote of an error that somebody else's code raised: the first line of its text without colours, or its
    kind."""
    return next(iter(_COLOUR.sub("", str(error)).strip().splitlines()), type(error).__name__)
