"""A comparison as it comes out of a run, made by hand."""

import pytest

from ptqc.comparison.compare import Comparison, LayerError, Run
from ptqc.evaluate import Evaluation

LAYERS = ("layers.0.up.weight", "layers.1.<odd>.weight")


def make_run(label, spec, bits, perplexity, kl, error):
    layers = tuple(LayerError(name, error * (1 + number)) for number, name in enumerate(LAYERS))
    evaluation = Evaluation(perplexity, kl, 0.9, 5110, 2.5)
    return Run(label, label.partition(":")[0], spec, bits, int(bits * 1e6), evaluation, 1.25, layers)


@pytest.fixture
def comparison():
    """Six runs, four of them near one another, and the float model."""
    runs = (
        make_run("rtn:4", "int4g64", 4.25, 42.40, 0.0130, 0.10),
        make_run("hqq:4", "int4g64f", 4.5, 42.10, 0.0102, 0.09),
        make_run("nf4", "nf4g64", 4.5, 42.00, 0.0092, 0.09),
        make_run("nf4:nf4g64dq", "nf4g64dq", 4.127, 42.01, 0.0093, 0.09),
        make_run("hqq:2", "int2g64f", 2.5, 61.40, 0.35, 0.40),
        make_run("int8", "int8", 8.03, 41.77, 0.00009, 0.01),
    )
    baseline = Run("float", "float", "float16", 16, 29_369_344, Evaluation(41.7655, None, None, 5110, 2.0))
    return Comparison("models/<reference>", "docs", 512, 10, baseline, runs)
