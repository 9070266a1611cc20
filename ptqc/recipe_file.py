"""Recipe files: YAML (or JSON, which is YAML) to rows, each with the line on which it stands.

- {pattern: lm_head, method: none}
- {pattern: "*.mlp.*", transforms: [{name: smoothquant, alpha: 0.8}], method: gptq, bits: 8, activation: int8-token}
- {pattern: "re:layers\\.[0-3]\\.", method: gptq, spec: int4g64z, options: {damp: 0.02}}
- {pattern: "*", method: rtn, bits: 4, group_size: 128}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ptqc.errors import PtqcError, first_line

__all__ = ["KEYS", "Row", "check_keys", "read_rows"]

_NUMBER = (int, float)
KEYS: dict[str, tuple[tuple[type, ...], str]] = {
    "pattern": ((str,), "a pattern of names"),
    "transforms": ((str, list, dict), "a transform or a list of them"),
    "method": ((str, list, dict, type(None)), "the name of a method, or none"),
    "bits": (_NUMBER, "a number"),
    "group_size": ((int,), "a whole number, -1 for the whole row"),
    "spec": ((str,), "a spec such as int4g64"),
    "activation": ((str,), "an activation spec such as int8-token"),
    "options": ((dict,), "a mapping of options"),
}
"""What a row may hold: the types in a file, and what to call them."""


@dataclass(frozen=True)
class Row:
    """One rule as it is written.

    source: the file, or which rule it is. lines: the line of every key, if in a file; option_lines: of every option, by
    the name of its component ("" where options stand alone) and its own.
    """

    values: Mapping[str, Any]
    source: str
    lines: Mapping[str, int] = field(default_factory=dict)
    option_lines: Mapping[tuple[str, str], int] = field(default_factory=dict)
    line: int | None = None

    def where_option(self, component: str, option: str) -> str:
        """Where an option of a component stands."""
        known = [self.option_lines.get((component, option)), self.option_lines.get(("", option)), self.line]
        line = next((line for line in known if line is not None), None)
        return self.source if line is None else f"{self.source} line {line}"

    def where(self, key: str | None = None) -> str:
        """Where the rule, or one key of it, stands."""
        line = self.line if key is None else self.lines.get(key, self.line)
        return self.source if line is None else f"{self.source} line {line}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a recipe file, checked for keys and types.

    Raises: PtqcError that names the line at fault and what would work.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise PtqcError(f"cannot read the recipe {path}: {error}".splitlines()[0]) from None
    except yaml.YAMLError as error:
        raise PtqcError(f"cannot read the recipe {path}: {_yaml_reason(error)}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists thousands deep
        raise PtqcError(f"cannot read the recipe {path}: {first_line(error)}") from None
    if not isinstance(node, yaml.SequenceNode):
        line = 1 if node is None else node.start_mark.line + 1
        raise PtqcError(
            f"the recipe {path} line {line}: a recipe is a list of rules; begin each with a dash, as in "
            '"- {pattern: mlp, method: hqq, bits: 4}"'
        )
    rows = [_row(item, value, path) for item, value in zip(node.value, values, strict=True)]
    for row in rows:
        _check_row(row)
    return rows


def _yaml_reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return problem if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _row(node: Any, value: Any, path: Path) -> Row:
    line = node.start_mark.line + 1
    if not isinstance(value, Mapping):
        raise PtqcError(f"{path} line {line}: a rule must be a mapping with the keys {', '.join(KEYS)}; got {value!r}")
    return Row(value, str(path), _lines(node), _option_lines(node), line)


def _lines(node: yaml.MappingNode) -> dict[str, int]:
    return {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def _option_lines(node: yaml.MappingNode) -> dict[tuple[str, str], int]:
    """The lines of options, wherever in a rule they are written."""
    lines: dict[tuple[str, str], int] = {}
    for key, below in node.value:
        entries = below.value if isinstance(below, yaml.SequenceNode) else [below]
        for entry in (entry for entry in entries if isinstance(entry, yaml.MappingNode)):
            names = [str(text.value) for name, text in entry.value if name.value == "name"]
            component = "" if key.value == "options" else next(iter(names), "")
            lines |= {(component, option): line for option, line in _lines(entry).items()}
    return lines


def _check_row(row: Row) -> None:
    """Hold a row of a file against the schema.

    Raises: PtqcError for an unknown key, a value of the wrong type, or a rule without a pattern.
    """
    check_keys(row)
    for key, value in row.values.items():
        types, wanted = KEYS[key]
        if not isinstance(value, types) or isinstance(value, bool):
            raise PtqcError(f"{row.where(key)}: {key} must be {wanted}; got {value!r}")


def check_keys(row: Row) -> None:
    """Hold the keys of a row against the schema.

    Raises: PtqcError for one that is unknown, or a rule without a pattern.
    """
    unknown = next((key for key in row.values if key not in KEYS), None)
    if unknown is not None:
        raise PtqcError(f"{row.where(str(unknown))}: a rule has no key {unknown!r}; known: {', '.join(KEYS)}")
    if "pattern" not in row.values:
        raise PtqcError(f'{row.where()}: the rule has no pattern; add one, "*" for every weight')
