import dataclasses

import pytest

from ptqc.comparison import plot


def labels(axes):
    return [note for note in axes.texts if note.xycoords == "data"]


@pytest.fixture
def panels(comparison):
    return plot.draw(comparison).axes


def test_the_panels_say_what_they_show(panels):
    left, right = panels
    assert left.get_title(loc="left") == "Perplexity"
    assert right.get_title(loc="left") == "KL divergence from the float model, nats per token"
    assert left.get_xlabel() == right.get_xlabel() == "bits per weight, scales included"
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")


def test_every_run_is_a_labelled_point(comparison, panels):
    points = {note.get_text(): note.xy for note in labels(panels[1])}
    assert points == {run.label: (run.bits_per_weight, run.evaluation.kl) for run in comparison.runs}


def test_the_float_model_is_a_line(panels):
    lines = [line for line in panels[0].lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in lines] == [41.7655]
    assert any(note.get_text() == "float16 41.77" for note in panels[0].texts)


def test_perplexities_far_apart_are_on_a_log_axis(comparison):
    far = dataclasses.replace(comparison.runs[4].evaluation, perplexity=4000.0)
    runs = (*comparison.runs[:4], dataclasses.replace(comparison.runs[4], evaluation=far))
    assert plot.draw(dataclasses.replace(comparison, runs=runs)).axes[0].get_yscale() == "log"


def test_one_run_is_enough(comparison):
    figure = plot.draw(dataclasses.replace(comparison, runs=comparison.runs[:1]), plot.DARK)
    assert len(labels(figure.axes[0])) == 1


def test_the_picture_is_reproducible(comparison):
    assert plot.to_svg(comparison) == plot.to_svg(comparison)
    assert plot.to_png(comparison) == plot.to_png(comparison)
    assert plot.to_svg(comparison).startswith(b"<?xml")
    assert plot.to_svg(comparison) != plot.to_svg(comparison, plot.DARK)
