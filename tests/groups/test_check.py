"""The float64 check of folds: it passes right folds, catches wrong ones, and changes nothing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ptqc.capture import capture
from ptqc.passes.groups.check import Float64, check_fold, float64_outputs, model_check, verify
from ptqc.passes.groups.find import find_groups
from ptqc.program import program
from tests.groups.structures import Model, RMSNorm, linear


def _run(m, x):
    return x + m.fc2(F.relu(m.fc1(m.norm(x))))


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = Model(_run, norm=RMSNorm(), fc1=linear(bias=True), fc2=linear()).eval()
    batch = {"x": torch.randn(2, 8, 16)}
    whole = program(capture(model, batch)[0], model, batch)
    return model, batch, whole, find_groups([whole])


def test_right_folds_agree_to_rounding(case):
    model, batch, whole, groups = case
    scales = [torch.rand(group.channels) + 0.5 for group in groups]
    before = {name: value.clone() for name, value in model.named_parameters()}
    for group, scale in zip(groups, scales, strict=True):
        assert check_fold(whole, batch, group, scale) < 1e-13
    assert max(verify(model, batch, groups, scales)) < 1e-13
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_a_fold_that_forgets_something_is_caught(case):
    model, batch, whole, groups = case
    scale = torch.rand(16) + 0.5
    forgetful = [replace(groups[0], consumers=()), replace(groups[1], producer=groups[1].producer[:1])]
    for wrong in forgetful:
        assert check_fold(whole, batch, wrong, scale) > 1e-3
        assert verify(model, batch, [wrong], [scale])[0] > 1e-3


def test_the_outputs_are_those_of_the_model_in_float64(case):
    model, batch, whole, _ = case
    (found,) = float64_outputs(whole, batch)
    assert found.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(found.float(), model(**batch))


def test_model_check_compares_two_sets_of_values(case):
    model, batch, whole, _ = case
    weight = model.fc1.weight.detach().double()
    for programs in ([whole], []):
        check = model_check(model, programs, batch)
        assert check({"fc1.weight": weight}, {"fc1.weight": weight}) == 0
        assert check({"fc1.weight": weight}, {"fc1.weight": weight * 1.1}) > 1e-4


def test_casts_inside_the_model_do_not_lose_precision():
    with Float64():
        x = torch.ones(2, dtype=torch.float32) / 3
        assert x.float().to(torch.bfloat16).dtype == torch.float64


def test_grouped_products_run_in_float64():
    x, weight = torch.randn(6, 16, dtype=torch.float64), torch.randn(2, 16, 8, dtype=torch.float64)
    with Float64() as mode:
        found = torch.ops.aten._grouped_mm(x, weight, torch.tensor([2, 6], dtype=torch.int32))
    assert not mode.as_is
    torch.testing.assert_close(found, torch.cat([x[:2] @ weight[0], x[2:] @ weight[1]]))


def test_what_became_nan_is_no_agreement(case):
    model, batch, whole, _ = case
    check = model_check(model, [whole], batch)
    weight = model.fc1.weight.detach().double()
    assert check({"fc1.weight": weight}, {"fc1.weight": weight * float("nan")}) == float("inf")


def test_a_module_that_makes_its_own_tensors_is_checked():
    class Positions(nn.Module):
        def forward(self, x):
            return x + torch.arange(8, dtype=torch.float32)[:, None]

    def run(m, x):
        return m.fc2(F.relu(m.fc1(m.positions(x))))

    model = Model(run, positions=Positions(), fc1=linear(), fc2=linear())
    batch = {"x": torch.randn(2, 8, 16)}
    groups = find_groups([program(capture(model, batch)[0], model, batch)])
    folds = [group for group in groups if group.kind == "fold"]
    assert verify(model, batch, folds, [torch.rand(16) + 0.5])[0] < 1e-13
