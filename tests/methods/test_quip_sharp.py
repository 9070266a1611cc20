"""QuIP#: the promises, and that feedback over vectors of eight lowers the error of the output."""

import pytest
import torch

from ptqc import grid, storage
from ptqc.errors import SpecError
from ptqc.hadamard import rotate
from ptqc.methods import METHODS, quantize_weight
from ptqc.passes.methods.quip_sharp import QuipSharp
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.spec import WeightSpec
from ptqc.testing import check_method


def hessian(columns):
    """Of inputs that correlate: a spectrum that falls by e^5 in a random basis."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(columns, columns, generator=generator) * torch.exp(-5 * torch.arange(columns) / columns)
    return root @ root.T / columns


def normal(*shape):
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def output_error(numbers, weight, hessian):
    """tr(E H E') as a share of tr(W H W')."""
    error = numbers - weight
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


def quantized(weight, spec, statistics, method=None):
    return quantize_weight(weight, method or QuipSharp(), WeightSpec.parse(spec), statistics=statistics).dequantize()


def by_columns(weight, spec, hessian):
    """Scalar codes with the same feedback (GPTQ), the scales those of rounding to nearest."""
    rounded = grid.storage.round_scale(RoundToNearest().choose(weight, spec, {}).scale, spec)
    upper = torch.linalg.cholesky((hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))).flip(0, 1))
    upper = upper.flip(0, 1)
    numbers = torch.zeros_like(weight)
    for column in range(len(hessian)):
        owed = (weight - numbers)[:, :column] @ upper[:column, column] / upper[column, column]
        target = weight.clone()
        target[:, column] += owed
        codes = grid.choose_codes(target, rounded, None, spec)
        numbers[:, column] = storage.combine(storage.levels(codes, spec), rounded, None, spec)[:, column]
    return numbers


@pytest.mark.parametrize(
    ("spec", "calibrated"),
    [("e8p", True), ("e8pt", True), ("e8pg16", True), ("e8p3", True), ("e8p4", True), ("e8p", False)],
)
def test_promises(spec, calibrated):
    statistics = (lambda columns: {"hessian": hessian(columns)}) if calibrated else None
    check_method(QuipSharp(), WeightSpec.parse(spec), statistics=statistics, is_exact_on_grid=False)


@pytest.mark.parametrize("spec", ["e8p", "e8p3", "e8p4"])
def test_feedback_beats_nearest(spec):
    weight, correlated = normal(64, 256), hessian(256)
    with_feedback = output_error(quantized(weight, spec, {"hessian": correlated}), weight, correlated)
    nearest = output_error(quantized(weight, spec, {}), weight, correlated)
    assert with_feedback < 0.4 * nearest


def test_two_bits_beat_integers_with_the_same_feedback():
    weight, correlated = normal(64, 256), hessian(256)
    lattice = output_error(quantized(weight, "e8p", {"hessian": correlated}), weight, correlated)
    integers = output_error(by_columns(weight, WeightSpec.parse("int2g128"), correlated), weight, correlated)
    assert lattice < 0.8 * integers


def test_rotated_weights_lose_their_outliers():
    weight, correlated = normal(64, 256), hessian(256)
    weight[3, ::50] = 2.0
    rotated = rotate(weight, "had256")
    turned = rotate(rotate(correlated, "had256").T, "had256")
    plain = output_error(quantized(weight, "e8p", {"hessian": correlated}), weight, correlated)
    assert output_error(quantized(rotated, "e8p", {"hessian": turned}), rotated, turned) < 0.3 * plain


def test_more_bits_are_better():
    weight, correlated = normal(32, 128), {"hessian": hessian(128)}
    errors = [
        output_error(quantized(weight, spec, correlated), weight, hessian(128)) for spec in ("e8p", "e8p3", "e8p4")
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_a_stack_is_its_matrices():
    weight = normal(3, 16, 64)
    hessians = torch.stack([hessian(64), torch.zeros(64, 64), torch.diag(torch.arange(64.0) % 3)])
    together = quantized(weight, "e8p", {"hessian": hessians})
    assert together.isfinite().all()
    for matrix, alone, own in zip(weight, together, hessians, strict=True):
        assert torch.equal(alone, quantized(matrix, "e8p", {"hessian": own}))


def test_the_loss_that_scales_are_chosen_by_falls():
    weight, correlated = normal(32, 128), {"hessian": hessian(128)}
    chosen = output_error(quantized(weight, "e8p", correlated), weight, hessian(128))
    for multiple in (0.8, 1.4):
        fixed = quantized(weight, "e8p", correlated, QuipSharp(multiples=(multiple,)))
        assert chosen < output_error(fixed, weight, hessian(128))


def test_specs():
    assert METHODS.get("quip_sharp") is QuipSharp and QuipSharp.brings == ("hadamard",)
    assert [str(QuipSharp().spec(bits)) for bits in (None, 2, 3, 4)] == ["e8p", "e8p", "e8p3", "e8p4"]
    assert str(QuipSharp().spec(2, 64)) == "e8pg64" and str(QuipSharp().spec(2, -1)) == "e8p"
    with pytest.raises(SpecError, match="2, 3 and 4 bits, not 5"):
        QuipSharp().spec(5)


@pytest.mark.parametrize(
    ("spec", "says"), [("int2g64", "lattice"), ("e8pb8x64", "float scales"), ("e8p-e8m0", "float")]
)
def test_refusals(spec, says):
    assert says in QuipSharp().refuses(WeightSpec.parse(spec))
    assert QuipSharp().refuses(WeightSpec.parse("e8pt-f32")) is None


@pytest.mark.parametrize("options", [{"damp": -1.0}, {"multiples": ()}, {"multiples": (0.0,)}])
def test_options_that_make_no_sense(options):
    with pytest.raises(SpecError):
        QuipSharp(**options)


def test_rows_that_eight_does_not_divide():
    with pytest.raises(SpecError, match=r'cannot store "weight" as e8p.*in_features 100; leave'):
        quantized(normal(8, 100), "e8p", {})
    with pytest.raises(SpecError, match="rtn rounds single weights"):
        quantized(normal(8, 64), "e8p", {}, RoundToNearest())
