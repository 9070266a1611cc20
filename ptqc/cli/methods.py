"""`ptqc methods`: what there is to quantize with, methods and transforms."""

from dataclasses import MISSING, Field, fields
from typing import Any

from ptqc.cli._output import Json, emit, show_table, table

__all__ = ["methods"]


def methods(is_json: Json = False) -> None:
    """List the methods and transforms.

    What each does, the format it stores by default, the bits that takes, the data it needs, and the options with their
    defaults. Transforms go before a method: smoothquant+gptq.
    """
    from ptqc.methods import METHODS
    from ptqc.transforms import TRANSFORMS

    rows = [_describe(name, METHODS.get(name), "method") for name in METHODS.names()]
    rows += [_describe(name, TRANSFORMS.get(name), "transform") for name in TRANSFORMS.names()]

    def render() -> None:
        made = table("method", "what it does", "default format", "bits/weight>", "data", "options")
        for row in rows:
            options = ", ".join(f"{name}={default}" for name, default in row["options"].items())
            name = row["name"] if row["kind"] == "method" else f"{row['name']} +"
            bits, data = f"{row['bits_per_weight']:.4g}", "yes" if row["needs"] else "-"
            made.add_row(name, row["what"], row["spec"], bits, data, options or "-")
        show_table(made, "name +: a transform, alone (with the method that it is made for) or before another method")

    emit(rows, render, is_json)


def _describe(name: str, kind: Any, what: str) -> dict[str, Any]:
    from ptqc.recipe import make_rule

    rule = make_rule("*", name)
    spec, made = rule.spec, kind()
    assert spec is not None
    return {
        "name": name,
        "kind": what,
        "what": _summary(kind),
        "stands_for": rule.label,
        "spec": str(spec),
        "activation": str(rule.activation),
        "bits_per_weight": spec.bits_per_weight,
        "needs": sorted(made.needs),
        "options": {field.name: _default(field) for field in fields(kind)},
    }


def _summary(method: type) -> str:
    """The first sentence of the docstring."""
    text = " ".join((method.__doc__ or "").split())
    return text.partition(". ")[0].removesuffix(".")


def _default(field: "Field[Any]") -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
