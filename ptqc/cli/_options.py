"""Options of a method or format, written as name=value."""

import json
from typing import Annotated, Any

import typer

from ptqc.errors import PtqcError

__all__ = ["Options", "read_options"]

Options = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the method or format; may be repeated.")
]


def read_options(pairs: list[str] | None) -> dict[str, Any]:
    """Read name=value pairs; a value is a number, true, false, null or a JSON text where it can be, else a string.

    >>> read_options(["iterations=20", "norm=0.7", "symmetric=false", "dtype=f32"])
    {'iterations': 20, 'norm': 0.7, 'symmetric': False, 'dtype': 'f32'}

    Raises: PtqcError for a pair without "=".
    """
    options = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise PtqcError(f"the option {pair!r} is not of the form name=value")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none", "null") else text)
    except ValueError:
        return None if text.lower() == "none" else text
