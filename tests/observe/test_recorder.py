"""The recorder: sharing, merging, masks, reasons and coverage."""

import torch
from torch import nn

from ptqc.passes.observe.layout import Layout
from ptqc.passes.observe.recorder import Recorder
from tests.observe._models import rows

W = [nn.Parameter(rows(8, 4, seed=n)) for n in range(3)]
STACK = nn.Parameter(rows(3, 8, 4))


def test_weights_of_one_value_share_their_statistics():
    recorder = Recorder({W[0]: {"hessian"}, W[1]: {"absmax"}, W[2]: {"mean"}})
    recorder.take(rows(6, 4), [W[0], W[1]], Layout())
    recorder.take(rows(6, 4), [W[2]], Layout())
    assert recorder.key(W[0]) == recorder.key(W[1]) != recorder.key(W[2])
    assert recorder.statistics(W[0]) is recorder.statistics(W[1])
    assert recorder.statistics(W[0]).keys() == {"hessian", "absmax"}
    assert len(recorder.slots) == 2


def test_several_values_are_merged():
    recorder = Recorder({W[0]: {"mean", "count", "rows"}, W[1]: {"mean", "absmax"}})
    x, y = rows(6, 4), rows(2, 4, seed=1)
    recorder.take(x, [W[0], W[1]], Layout())
    recorder.take(y, [W[0]], Layout())
    found = recorder.statistics(W[0])
    torch.testing.assert_close(found["mean"], torch.cat([x, y]).mean(0))
    assert float(found["count"]) == 8 and found["rows"].shape == (8, 4)
    torch.testing.assert_close(recorder.statistics(W[1])["mean"], x.mean(0))
    assert float(recorder.slots[recorder.key(W[1])[0]].count) == 6


def test_new_data_makes_new_statistics():
    recorder = Recorder({W[0]: {"count"}})
    recorder.take(rows(6, 4), [W[0]], Layout())
    first = recorder.statistics(W[0])
    assert recorder.statistics(W[0]) is first
    recorder.take(rows(6, 4), [W[0]], Layout())
    assert float(recorder.statistics(W[0])["count"]) == 12
    recorder.forget(W[0])
    assert float(recorder.statistics(W[0])["count"]) == 12


def test_weights_nobody_wants_cost_nothing():
    recorder = Recorder({W[0]: {"hessian"}})
    recorder.take(rows(6, 4), [W[1]], Layout())
    recorder.note([W[1]], "unseen")
    assert not recorder.slots and not recorder.reasons


def test_masked_tokens_do_not_count():
    recorder = Recorder({W[0]: {"count"}, W[1]: {"count"}, W[2]: {"count"}})
    recorder.begin(0, {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    recorder.take(rows(2, 3, 4), [W[0]], Layout())
    recorder.take(rows(6, 4), [W[1]], Layout())
    recorder.take(rows(2, 5, 4), [W[2]], Layout())
    assert [float(recorder.statistics(weight)["count"]) for weight in W] == [3, 3, 10]


def test_two_masks_cannot_be_told_apart():
    recorder = Recorder({W[0]: {"count"}})
    recorder.begin(0, {"attention_mask": torch.tensor([[1, 0]]), "decoder_input_ids": torch.tensor([[1, 2]])})
    recorder.take(rows(1, 2, 4), [W[0]], Layout())
    assert float(recorder.statistics(W[0])["count"]) == 2


def test_reasons():
    recorder = Recorder({weight: {"hessian"} for weight in W})
    recorder.note([W[0]], "inside a kernel")
    recorder.take(torch.full((2, 4), float("inf")), [W[1]], Layout())
    assert [recorder.reason(weight) for weight in W] == [
        "inside a kernel",
        "its inputs are not all finite",
        "no calibration data reached it",
    ]
    assert recorder.statistics(W[2]) == {}


def test_coverage_counts_the_rows_of_experts():
    recorder = Recorder({STACK: {"mean"}, W[0]: {"mean"}})
    assert recorder.coverage(STACK).tolist() == [0, 0, 0]
    recorder.take(rows(5, 4), [STACK], Layout(-1, "given", 3, (-2,)), torch.tensor([0, 2, 2, 2, 0]))
    recorder.take(rows(5, 4), [W[0]], Layout())
    assert recorder.coverage(STACK).tolist() == [2, 0, 3]
    assert recorder.coverage(W[0]).tolist() == [5]


def test_one_process_reduces_to_itself():
    recorder = Recorder({W[0]: {"count"}})
    recorder.take(rows(6, 4), [W[0]], Layout())
    recorder.all_reduce()
    assert float(recorder.statistics(W[0])["count"]) == 6
