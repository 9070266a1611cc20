"""The output projection inside the attention of torch, against what the same function computes in parts."""

import pytest
import torch
from torch import nn

from ptqc.capture import capture
from ptqc.passes.observe.insert_observers import InsertObservers
from ptqc.passes.observe.recorder import Recorder
from ptqc.passes.observe.run import observe
from ptqc.pipeline import Context, Pipeline
from ptqc.program import program
from ptqc.statistics import STATISTICS
from tests.observe._models import rows


class Attends(nn.Module):
    def __init__(self, needs_weights=False):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.needs_weights = nn.MultiheadAttention(32, 4, batch_first=True), needs_weights

    def forward(self, x, y):
        return self.attention(x, y, y, need_weights=self.needs_weights)[0]


BATCH = {"x": rows(2, 5, 32), "y": rows(2, 7, 32, seed=1)}


def by_parts(model, batch):
    """Statistics from the functional graph, in which attention has no inside."""
    (captured,) = capture(model, batch)
    traced = program(captured, model, batch)
    recorder = Recorder(dict.fromkeys(model.parameters(), STATISTICS))
    Pipeline([InsertObservers(traced.parameters, recorder)]).run(
        traced.module, Context(lambda _: pytest.fail("no kernel is asked for"))
    )
    traced.module(*traced.arguments(batch))
    return recorder


@pytest.mark.parametrize("needs_weights", [False, True])
def test_projections_of_attention(needs_weights):
    model = Attends(needs_weights).eval()
    recorder, parts = observe(model, [BATCH], dict.fromkeys(model.parameters(), STATISTICS)), by_parts(model, BATCH)
    packed, out = model.attention.in_proj_weight, model.attention.out_proj.weight
    for weight in (packed, out):
        assert recorder.reason(weight) is None and parts.reason(weight) is None
        found = recorder.statistics(weight)
        torch.testing.assert_close(found["absmax"], parts.statistics(weight)["absmax"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        recorder.statistics(out)["hessian"], parts.statistics(out)["hessian"], rtol=1e-4, atol=1e-5
    )
    assert float(recorder.statistics(out)["count"]) == 10
