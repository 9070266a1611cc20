"""What a run of the engine says about itself: of each piece, and put together of all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptqc.groups import ScaleGroup

__all__ = ["GroupOutcome", "Report"]


@dataclass(frozen=True)
class GroupOutcome:
    """What a transform did to a scale group. error: relative change of the outputs, checked in wide arithmetic."""

    group: ScaleGroup
    transform: str
    done: str
    """"folded", "run-time", "undone" or "left"."""
    error: float | None = None


@dataclass
class Report:
    """What a run did, for the user: how the model was captured, groups, and everything that fell short."""

    route: str = ""
    groups: list[GroupOutcome] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Weights that stayed in float although a rule wanted them, and why."""
    coverage: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Rows that each expert of a stack has seen, by weight."""
    _said: dict[str, list[str]] = field(default_factory=dict)

    def note(self, text: str, weight: str | None = None) -> None:
        """Say something once, about a weight or in general."""
        names = self._said.setdefault(text, [])
        if weight is not None and weight not in names:
            names.append(weight)

    def add(self, piece: "Report") -> None:
        """Say what happened to a piece of the model as well."""
        self.groups += piece.groups
        self.skipped |= piece.skipped
        self.coverage |= piece.coverage
        for text, names in piece._said.items():
            self.note(text)
            for name in names:
                self.note(text, name)

    @property
    def notes(self) -> list[str]:
        """What fell short, a line each; what holds for several weights in one line that names the first."""
        return [_line(text, names) for text, names in self._said.items()]

    @property
    def counts(self) -> Mapping[str, int]:
        """How many groups ended in which way."""
        found: dict[str, int] = {}
        for outcome in self.groups:
            found[outcome.done] = found.get(outcome.done, 0) + 1
        return found

    # ---------------------------------------------------------------- kept with a finished piece

    def to_json(self, groups: Sequence[ScaleGroup]) -> dict[str, Any]:
        """What was said of a piece, as plain values. groups: all of the piece, which are found again."""
        at = {group: place for place, group in enumerate(groups)}
        return {
            "groups": [[at[one.group], one.transform, one.done, one.error] for one in self.groups],
            "skipped": self.skipped,
            "coverage": {name: list(rows) for name, rows in self.coverage.items()},
            "said": self._said,
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any], groups: Sequence[ScaleGroup]) -> "Report":
        """Invert `to_json`."""
        outcomes = [GroupOutcome(groups[at], transform, done, error) for at, transform, done, error in fields["groups"]]
        coverage = {name: tuple(rows) for name, rows in fields["coverage"].items()}
        return Report("", outcomes, dict(fields["skipped"]), coverage, dict(fields["said"]))


def _line(text: str, names: Sequence[str]) -> str:
    if not names:
        return text
    return f'"{names[0]}": {text}' if len(names) == 1 else f'{len(names)} weights, first "{names[0]}": {text}'
