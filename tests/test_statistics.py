"""Statistics: against their definitions, merged, masked, and for stacks of experts."""

import pytest
import torch

from ptqc.errors import PtqcError
from ptqc.statistics import STATISTICS, Statistics


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def gathered(*pieces, **options):
    found = Statistics(pieces[0].shape[-1], STATISTICS, **options)
    for number, piece in enumerate(pieces):
        found.update(piece, batch=number)
    return found


def test_a_matrix_has_the_statistics_of_its_rows():
    x = rows(3, 1500, 12)
    flat, found = x.view(-1, 12).double(), gathered(x).result()
    assert found.keys() == STATISTICS
    assert all(value.dtype == torch.float32 for value in found.values())
    torch.testing.assert_close(found["hessian"].double(), flat.T @ flat / 4500, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["absmax"].double(), flat.abs().amax(0))
    torch.testing.assert_close(found["mean_abs"].double(), flat.abs().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["mean"].double(), flat.mean(0), rtol=1e-6, atol=1e-6)
    assert float(found["count"]) == 4500
    assert found["rows"].shape == (512, 12)
    assert bool((found["rows"][:, None] == flat[None].float()).all(-1).any(1).all())
    assert bool((found["percentile"] <= found["absmax"]).all() and (found["percentile"] > 2).all())


def test_only_what_is_wanted_is_kept():
    found = Statistics(8, {"mean"})
    found.update(rows(4, 8))
    assert found.result().keys() == {"mean"}
    assert found.product is None and not found.reservoirs


def test_merging_is_the_whole_stream():
    batches = [rows(40 + n, 12, seed=n) for n in range(20)]
    whole, merged = gathered(*batches), Statistics(12, STATISTICS)
    for rank in (2, 0, 1):
        part = Statistics(12, STATISTICS)
        for number in range(rank, 20, 3):
            part.update(batches[number], batch=number)
        merged.merge(part)
    for name, value in whole.result().items():
        exact = name in ("absmax", "count", "rows", "percentile")
        torch.testing.assert_close(merged.result()[name], value, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)


def test_calls_within_a_batch_count_on():
    x = rows(700, 4)
    twice = Statistics(4, {"rows"})
    for half in x.split(350):
        twice.update(half, batch=5)
    once = Statistics(4, {"rows"})
    once.update(x, batch=5)
    assert torch.equal(once.result()["rows"], twice.result()["rows"])


def test_masked_rows_do_not_count():
    x, mask = rows(2, 6, 8), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    masked = Statistics(8, STATISTICS)
    masked.update(x, mask=mask)
    kept = x[mask].double()
    assert float(masked.result()["count"]) == 9
    torch.testing.assert_close(masked.result()["hessian"].double(), kept.T @ kept / 9, rtol=1e-5, atol=1e-5)


def test_a_stack_has_statistics_for_each_expert():
    x, index = rows(90, 8), torch.arange(90) % 4 - 1
    x[5] = 0  # routed to expert 0, but empty
    found = Statistics(8, STATISTICS, experts=4)
    found.update(x.view(9, 10, 8), index.view(9, 10))
    result = found.result()
    assert result["count"].tolist() == [22, 22, 22, 0]
    for expert in range(3):
        mine = x[(index == expert) & (x != 0).any(-1)].double()
        torch.testing.assert_close(result["hessian"][expert].double(), mine.T @ mine / len(mine), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["absmax"][expert].double(), mine.abs().amax(0))
    assert {name: tuple(value.shape) for name, value in result.items() if name in ("rows", "mean")} == {
        "rows": (4, 22, 8),
        "mean": (4, 8),
    }
    assert result["hessian"][3].abs().sum() == 0


def test_infinite_inputs_are_known():
    found = Statistics(4, {"hessian"})
    found.update(torch.tensor([[1.0, float("nan"), 0, 0]]))
    assert not found.is_finite
    assert Statistics(4, {"hessian"}).is_finite


def test_half_precision_is_summed_in_float32():
    x = rows(4096, 4).bfloat16()
    found = gathered(x).result()
    torch.testing.assert_close(found["mean"], x.float().mean(0), rtol=1e-5, atol=1e-5)


def test_misuse_is_said():
    with pytest.raises(PtqcError, match="no statistic 'fisher'; there are absmax"):
        Statistics(4, {"fisher"})
    with pytest.raises(PtqcError, match="need the expert that each belongs to"):
        Statistics(4, {"mean"}, experts=2).update(rows(3, 4))
    with pytest.raises(PtqcError, match="different kinds"):
        Statistics(4, {"mean"}).merge(Statistics(4, {"hessian"}))


def test_restricted_shares_the_sums():
    found = gathered(rows(10, 4))
    few = found.restricted({"hessian", "count"})
    assert few.result().keys() == {"hessian", "count"}
    assert few.product is found.product
