"""Option types: values of options held against the annotations of the fields, or arguments, that they are for.

Numbers, texts, true and false, none, fixed words, lists of these, and unions are told apart; of any other annotation
only the class is. So the fields of a method, a transform or a format are all that says what its options may be.
"""

from collections.abc import Callable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["wrong_option"]

_PLAIN: Mapping[object, tuple[type, tuple[str, ...], str]] = {
    bool: (bool, ("true", "false"), "true or false"),
    int: (Integral, ("a whole number",), "whole numbers"),
    float: (Real, ("a number",), "numbers"),
    str: (str, ("a text",), "texts"),
    NoneType: (NoneType, ("none",), "none"),
}
"""Annotation -> the class of its values, what to call one, and many of them."""


def wrong_option(kind: Callable[..., Any], options: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first option whose value is not of the type of its field, and what is wrong; None if there is none.

    kind: a dataclass, or a function whose arguments the options are.

    >>> from dataclasses import dataclass
    >>> from typing import Literal
    >>> @dataclass
    ... class Kind:
    ...     damp: float = 0.01
    ...     order: bool | Literal["static"] = False
    >>> wrong_option(Kind, {"damp": 1, "order": "never"})
    ('order', 'order must be true, false or "static"; got \\'never\\'')
    """
    hints = _hints(kind)
    for name, value in options.items():
        if name in hints and not _takes(hints[name], value):
            return name, f"{name} must be {_listed(_words(hints[name]))}; got {value!r}"
    return None


@cache
def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except (NameError, TypeError, AttributeError):  # a plug-in whose annotations name what is not there at run time
        return {}


def _takes(annotation: Any, value: object) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_takes(one, value) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if annotation in _PLAIN:
        is_flag = isinstance(value, bool)  # a whole number to Python
        return is_flag if annotation is bool else isinstance(value, _PLAIN[annotation][0]) and not is_flag
    if origin is tuple:
        is_list = isinstance(value, (list, tuple))
        return is_list and all(_takes(arguments[0], one) for one in value)  # type: ignore[attr-defined]
    try:
        return isinstance(value, origin or annotation)
    except TypeError:  # Any, type variables, protocols
        return True


def _words(annotation: Any) -> list[str]:
    """What may be written for an annotation, one by one."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return [word for one in arguments for word in _words(one)]
    if origin is Literal:
        return [f'"{one}"' if isinstance(one, str) else str(one).lower() for one in arguments]
    if annotation in _PLAIN:
        return list(_PLAIN[annotation][1])
    if origin is tuple and arguments[0] in _PLAIN:
        return [f"a list of {_PLAIN[arguments[0]][2]}"]
    return [f"a {getattr(origin or annotation, '__name__', str(annotation))}"]


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
