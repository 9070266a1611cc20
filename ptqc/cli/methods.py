"""`ptqc methods`: what there is to quantize with."""

from dataclasses import MISSING, Field, fields
from typing import Any

from ptqc.cli._output import Json, emit, show_table, table

__all__ = ["methods"]


def methods(is_json: Json = False) -> None:
    """List the methods.

    What each does, the format it stores by default, the bits that takes, and the options with their defaults.
    """
    from ptqc.methods import METHODS

    rows = [_describe(name, METHODS.get(name)) for name in METHODS.names()]

    def render() -> None:
        made = table("method", "what it does", "default format", "bits/weight>", "options")
        for row in rows:
            options = ", ".join(f"{name}={default}" for name, default in row["options"].items())
            made.add_row(row["name"], row["what"], row["spec"], f"{row['bits_per_weight']:.4g}", options or "-")
        show_table(made)

    emit(rows, render, is_json)


def _describe(name: str, method: Any) -> dict[str, Any]:
    spec = method().spec()
    return {
        "name": name,
        "what": _summary(method),
        "spec": str(spec),
        "bits_per_weight": spec.bits_per_weight,
        "needs": sorted(method.needs),
        "options": {field.name: _default(field) for field in fields(method)},
    }


def _summary(method: type) -> str:
    """The first sentence of the docstring."""
    text = " ".join((method.__doc__ or "").split())
    return text.partition(". ")[0].removesuffix(".")


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
