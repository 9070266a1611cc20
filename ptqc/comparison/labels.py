"""Labels of the points of a plot, each at the free place nearest to its point.

Every label may stand at any of a few dozen places around its point. A place costs its distance and whatever it covers
or would be taken to belong to; labels choose the cheapest place one after another, several times over, from several
orders, and the arrangement of the lowest total cost is kept. The same plot always gets the same arrangement.

All geometry is in pixels. A box is [left, bottom, right, top]; a leader is the way from a point to its label.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.text import Text
from numpy.typing import NDArray

__all__ = ["place_labels"]

Array = NDArray[np.float64]

_DISTANCES = (7, 11, 16, 23, 32, 44, 60)
_DIRECTIONS = (
    (1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8),
    (1, 0.4), (-1, 0.4), (1, -0.4), (-1, -0.4),
)  # fmt: skip
_OFFSETS = np.array([(dx * distance, dy * distance) for distance in _DISTANCES for dx, dy in _DIRECTIONS])
"""[places, 2] in points of 1/72 inch, nearest first."""
_MARGIN = 2.0
_ROUNDS = 3
_WITH_LEADER = 12.0
"""From this distance on, in points, a thin line joins label and point."""


@dataclass(frozen=True)
class _Choices:
    """The places of one label. boxes: [places, 4]. leaders: [places, 20, 2]. costs: [places], others left aside."""

    boxes: Array
    leaders: Array
    costs: Array

    def conflicts(self, other: "_Choices", place: int) -> Array:
        """What each place costs beside another label at one of its places, [places]."""
        box, leader = other.boxes[place], other.leaders[place]
        crossed = _inside(box, self.leaders).any(-1) + 1.0 * _inside(self.boxes[:, None], leader).any(-1)
        return 20.0 * _overlap(self.boxes, box) + 5.0 * crossed


def place_labels(axes: Any) -> None:
    """Move the annotations of data points in `axes`, which must have been laid out, to where they can be read.

    Each must have been made by `annotate` with offset points and an arrow, which is shown where the label is far.
    """
    notes = [note for note in axes.texts if note.xycoords == "data"]
    points = axes.transData.transform([note.xy for note in notes])
    choices = _choices(axes, notes, points)
    orders = [np.argsort(key, kind="stable").tolist() for key in (-points[:, 0], points[:, 0], points[:, 1])]
    arrangements = [_arrange(choices, order) for order in orders]
    totals = [_total(choices, arrangement) for arrangement in arrangements]
    for note, place in zip(notes, arrangements[totals.index(min(totals))], strict=True):
        x, y = _OFFSETS[place].tolist()
        note.set(position=(x, y), ha="left" if x > 0 else "right" if x < 0 else "center",
                 va="bottom" if y > 0 else "top" if y < 0 else "center")  # fmt: skip
        note.arrow_patch.set_visible(bool(np.hypot(x, y) > _WITH_LEADER))


def _arrange(choices: Sequence[_Choices], order: Sequence[int]) -> list[int]:
    """A place for every label, each the best given the others."""
    chosen: dict[int, int] = {}
    for number in list(order) * _ROUNDS:
        costs = choices[number].costs.copy()
        for other, place in chosen.items():
            if other != number:
                costs += choices[number].conflicts(choices[other], place)
        chosen[number] = int(costs.argmin())
    return [chosen[number] for number in range(len(choices))]


def _total(choices: Sequence[_Choices], arrangement: Sequence[int]) -> float:
    """The cost of an arrangement; conflicts count for both labels."""
    total = 0.0
    for number, place in enumerate(arrangement):
        total += choices[number].costs[place]
        for other in range(len(choices)):
            if other != number:
                total += choices[number].conflicts(choices[other], arrangement[other])[place] / 2
    return total


def _choices(axes: Any, notes: Sequence[Any], points: Array) -> list[_Choices]:
    renderer = axes.figure.canvas.get_renderer()
    steps = np.linspace(0, 1, 20)[:, None] * (_OFFSETS * axes.figure.dpi / 72)[:, None]
    inside_axes = np.array(axes.get_window_extent(renderer).extents)
    fixed = [np.array(Text.get_window_extent(note, renderer).extents) for note in axes.texts if note not in notes]
    lines = np.concatenate([_along(line) for line in axes.lines])
    colours = np.array([note.get_color() for note in notes])
    found = []
    for number, note in enumerate(notes):
        leaders = points[number] + steps
        boxes = _boxes(leaders[:, -1], Text.get_window_extent(note, renderer))
        others = np.delete(points, number, axis=0)
        costs = np.hypot(*_OFFSETS.T) / 15
        costs += 20.0 * sum(_overlap(boxes, text) for text in fixed)
        costs += 10.0 * _inside(boxes[:, None], points).sum(-1)
        costs += 0.4 * np.sqrt(_inside(boxes[:, None], lines).sum(-1))
        costs += _misread(boxes, leaders, points[number], others, np.delete(colours, number) == colours[number])
        costs += 40.0 * ((boxes[:, :2] < inside_axes[:2]).any(-1) | (boxes[:, 2] > inside_axes[2]))
        found.append(_Choices(boxes, leaders, costs))
    return found


def _boxes(ends: Array, extent: Any) -> Array:
    """Boxes [places, 4] of a label beside, above or below the ends [places, 2] of its leaders, or centred there."""
    size = np.array([extent.width, extent.height])
    low = ends - size * (0.5 - 0.5 * np.sign(_OFFSETS))
    return np.concatenate([low - _MARGIN, low + size + _MARGIN], axis=1)


def _misread(boxes: Array, leaders: Array, own: Array, others: Array, is_alike: NDArray[np.bool_]) -> Array:
    """The cost of seeming to belong to other points: nearer to them, most of all in the same colour; or across them."""
    if not len(others):
        return np.zeros(len(boxes))
    is_nearer = _gaps(boxes, others) < _gaps(boxes, own[None]) + 1
    is_across = np.hypot(*np.moveaxis(leaders[:, :, None] - others, -1, 0)).min(1) < 8
    cost: Array = 1.0 * is_nearer.sum(-1) + 2.0 * (is_nearer & is_alike).sum(-1) + 3.0 * is_across.sum(-1)
    return cost


def _along(line: Any) -> Array:
    """Pixels along a line, [points, 2]."""
    corners: Array = line.get_transform().transform(line.get_xydata())
    share = np.linspace(0, 1, 200)[:, None, None]
    return (corners[:-1] * (1 - share) + corners[1:] * share).reshape(-1, 2)


def _gaps(boxes: Array, points: Array) -> Array:
    """Pixels from boxes [boxes, 4] to points [points, 2]: [boxes, points]."""
    beyond = np.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:]).clip(0)
    gaps: Array = np.hypot(beyond[..., 0], beyond[..., 1])
    return gaps


def _inside(box: Array, points: Array) -> NDArray[np.bool_]:
    """Which of points [..., 2] lie in a box [..., 4]."""
    return np.asarray(((points > box[..., :2]) & (points < box[..., 2:])).all(-1))


def _overlap(boxes: Array, other: Array) -> NDArray[np.bool_]:
    """Which of boxes [boxes, 4] overlap another one [4]."""
    return np.asarray(((boxes[:, :2] < other[2:]) & (boxes[:, 2:] > other[:2])).all(-1))
