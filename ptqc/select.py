"""Patterns over qualified names: globs, or regular expressions after "re:"."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from ptqc.errors import PtqcError

__all__ = ["matches"]


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
