"""What a plan says: weights, scale groups, what stays in float, sizes and times, as values and in a few lines."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ptqc.sites import Skipped

__all__ = ["NOT_CAPTURED", "Plan", "PlannedGroup", "PlannedWeight"]

NOT_CAPTURED = "no graph: none is needed"


@dataclass(frozen=True)
class PlannedWeight:
    """One weight to quantize. shape: [*lead, out, in] as stored. method: transforms and method, "awq+rtn"."""

    name: str
    shape: tuple[int, ...]
    method: str
    spec: str
    activation: str
    nbytes: int
    source_bytes: int


@dataclass(frozen=True)
class PlannedGroup:
    """A scale group: what it is, whether a scale can be folded, and why not if it cannot."""

    value: str
    structure: str
    kind: str
    reason: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What would be done. capture: how the model becomes graphs. source_bytes, output_bytes: of the whole model.

    peak_bytes, seconds: estimates (`ptqc.estimate`). notes: what else to know.
    """

    capture: str
    weights: tuple[PlannedWeight, ...]
    groups: tuple[PlannedGroup, ...]
    skipped: tuple[Skipped, ...]
    source_bytes: int
    output_bytes: int
    peak_bytes: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        """True if nothing would be quantized."""
        return not self.weights

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight in the mean, scales included."""
        count = sum(torch.Size(weight.shape).numel() for weight in self.weights)
        return 8 * sum(weight.nbytes for weight in self.weights) / max(1, count)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"bits_per_weight": self.bits_per_weight}

    def short(self) -> str:
        """The plan in three to six lines."""
        kinds = Counter(f"{weight.method} {weight.spec}" for weight in self.weights)
        what = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(4))
        lines = [
            f"plan: {len(self.weights)} weights ({what or 'none'}), {self.bits_per_weight:.4g} bits per weight",
            f"  {_mb(self.source_bytes)} -> {_mb(self.output_bytes)}; about {_mb(self.peak_bytes)} of memory and "
            f"{_duration(self.seconds)} (estimates)",
        ]
        if self.capture != NOT_CAPTURED:
            lines.append(f"  captured as {self.capture}" + self._groups_in_short())
        if self.skipped:
            reasons = Counter(entry.reason for entry in self.skipped).most_common()
            more = f"; {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
            lines.append("  in float: " + "; ".join(f"{count} {reason}" for reason, count in reasons[:3]) + more)
        return "\n".join([*lines, *(f"  {note}" for note in self.notes[:2])])

    def _groups_in_short(self) -> str:
        kinds = Counter(group.kind for group in self.groups)
        names = (("fold", "to fold"), ("run-time", "at run time"), ("refused", "refused"))
        counted = ", ".join(f"{kinds[kind]} {name}" for kind, name in names if kinds[kind])
        return f"; scale groups: {counted}" if counted else ""


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, seconds):.0f} s"
