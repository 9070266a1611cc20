from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from ptqc.comparison import plot
from ptqc.comparison.labels import place_labels


def scatter(points):
    """Axes with a labelled point at each of `points`."""
    figure = Figure(figsize=(6, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*np.transpose(points))
    for number, point in enumerate(points):
        axes.annotate(
            f"label {number}", point, textcoords="offset points", xytext=(0, 0), arrowprops={"arrowstyle": "-"}
        )
    figure.draw_without_rendering()
    return axes


def assert_legible(axes):
    renderer = axes.figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(note, renderer) for note in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = axes.transData.transform([note.xy for note in axes.texts if note.xycoords == "data"])
    assert not any(box.contains(*point) for box in boxes for point in points)


@pytest.mark.parametrize("panel", [0, 1])
def test_labels_of_a_comparison_are_legible(comparison, panel):
    assert_legible(plot.draw(comparison).axes[panel])


def test_a_dense_cluster_is_legible():
    generator = np.random.default_rng(0)
    cluster = np.array([4.5, 40.0]) + generator.normal(size=(9, 2)) * 0.05
    axes = scatter([(2, 60), *cluster.tolist(), (8, 39)])
    place_labels(axes)
    assert_legible(axes)


def test_a_lone_label_is_beside_its_point_without_leader():
    axes = scatter([(0, 0), (1, 1)])
    place_labels(axes)
    for note in axes.texts:
        assert np.hypot(*note.get_position()) < 12
        assert not note.arrow_patch.get_visible()


def test_far_labels_have_a_leader():
    axes = scatter([(0, 0), *[(1, 1 + 0.001 * number) for number in range(12)], (2, 2)])
    place_labels(axes)
    for note in axes.texts:
        assert note.arrow_patch.get_visible() == (np.hypot(*note.get_position()) > 12)
    assert any(note.arrow_patch.get_visible() for note in axes.texts)


def test_the_same_plot_has_the_same_arrangement():
    points = [(0, 0), (1, 1), (1.01, 1), (1, 1.01), (2, 2)]
    first, second = scatter(points), scatter(points)
    place_labels(first)
    place_labels(second)
    assert [note.get_position() for note in first.texts] == [note.get_position() for note in second.texts]
