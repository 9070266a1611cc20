"""Patterns over qualified names: globs, or regular expressions after "re:"."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from ptqc.errors import PtqcError

__all__ = ["Patterns", "matches", "matches_any", "patterns_of", "unmatched"]

Patterns = str | Iterable[str]
"""One pattern or several, as a user gives them."""


def patterns_of(given: Patterns, what: str = "patterns") -> tuple[str, ...]:
    """The patterns that a user gives: a text is one pattern, not one for each of its letters.

    >>> patterns_of("lm_head"), patterns_of(["lm_head", "*.mlp.*"])
    (('lm_head',), ('lm_head', '*.mlp.*'))

    Raises: PtqcError for what is no text.
    """
    if isinstance(given, str):
        return (given,)
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    for pattern in found:
        if not isinstance(pattern, str):
            raise PtqcError(f'{what} takes patterns of names, as in ["lm_head", "*.mlp.*"]; got {pattern!r}')
    return found


def matches_any(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether any pattern names a parameter by any of its names: one that is tied has several."""
    wanted = tuple(patterns)
    return any(matches(name, wanted) for name in names)


def unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The patterns that name none of the parameters: misspelt, most likely."""
    known = list(names)
    return [pattern for pattern in patterns if not any(matches(name, [pattern]) for name in known)]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any pattern names the parameter `name`, or a module that holds it.

    "lm_head" and "*.mlp.*" are globs on the name, on any of its prefixes at a dot, and on any of its last parts
    ("q_proj" finds "model.layers.0.self_attn.q_proj.weight"); "re:..." is a regular expression searched in the name.

    >>> matches("model.layers.0.mlp.up_proj.weight", ["up_proj"])
    True

    Raises: PtqcError for a regular expression that does not compile.
    """
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise PtqcError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    parts = name.split(".")
    spans = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(fnmatchcase(span, pattern) for span in spans)
