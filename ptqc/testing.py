"""For tests of methods, transforms and passes: what each of them promises, as one call.

check_method(MyMethod(), WeightSpec.parse("int4g32"))
check_transform(MyTransform())
assert_same_function(model, changed, batch, tolerance=1e-9)
self.assertExpectedInline(graph_text(module), "...")        # with expecttest
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqc import grid, storage
from ptqc.checks import assert_same_function, check_transform, sample_statistics
from ptqc.errors import WeightError
from ptqc.graph_text import graph_text
from ptqc.methods import Method, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import SCALE_DTYPES, WeightSpec

__all__ = [
    "assert_same_function", "check_method", "check_transform", "graph_text", "sample_statistics", "worst_error",
]  # fmt: skip

Statistics = Callable[[int], Mapping[str, Tensor]]


def check_method(
    method: Method,
    spec: WeightSpec | None = None,
    *,
    statistics: Statistics | None = None,
    slack: float = 1.0,
    is_exact_on_grid: bool = True,
) -> None:
    """Assert that a method keeps its promises for a spec (None: its default).

    Finite numbers of the right shape and dtype; a bounded error; the same codes twice; the weight left alone; odd
    shapes and stacks; zero rows and columns, constant rows, one huge outlier, tiny and huge weights; rows that do not
    depend on each other; transposed weights; NaN and infinity refused by name.

    statistics: of the input, by in_features, for methods that need them; those of `sample_statistics` by default.
    slack: how many times the worst error of rounding to nearest a group's root mean square error may reach.
    is_exact_on_grid: a weight that the spec can hold exactly comes back exactly.

    Raises: AssertionError saying which promise was broken.
    """
    if statistics is None and method.needs:
        statistics = sample_statistics
    case = _Case(method, spec or method.spec(), statistics, slack)
    for check in _CHECKS:
        check(case)
    if is_exact_on_grid and not case.is_nested:
        _on_the_grid(case)


def worst_error(spec: WeightSpec) -> float:
    """Largest error of rounding to nearest under the largest magnitude of a group, as a share of that magnitude."""
    book = spec.book
    if book is None:
        return 1 / ((1 << spec.bits) - 1)
    if spec.codebook == "ternary" or book.lattice is not None:
        return 1.0
    if book.float_dtype is not None:
        return float(torch.finfo(book.float_dtype).eps) / 2
    levels = torch.tensor(sorted(book.levels))
    one_sided = max(book.largest - float(levels.max()), book.largest + float(levels.min()))
    return max(float(levels.diff().max()) / 2, one_sided) / book.largest


@dataclass(frozen=True)
class _Case:
    method: Method
    spec: WeightSpec
    statistics: Statistics | None
    slack: float

    @property
    def is_nested(self) -> bool:
        return self.spec.scale.bits is not None

    @property
    def rows_are_independent(self) -> bool:
        return self.spec.rows == 1 and not self.is_nested and not self.method.needs

    @property
    def width(self) -> int:
        """Two groups of inputs."""
        return 2 * (self.spec.group or 48)

    def quantize(self, weight: Tensor, is_transposed: bool = False) -> QuantTensor:
        shape = weight.mT.shape if is_transposed else weight.shape
        statistics = {} if self.statistics is None else self.statistics(shape[-1])
        spec = self.spec.fit(shape)
        return quantize_weight(weight, self.method, spec, statistics=statistics, is_transposed=is_transposed)

    def numbers(self, weight: Tensor) -> Tensor:
        """The weight quantized and back."""
        return self.quantize(weight).dequantize()

    def require(self, condition: bool | Tensor, promise: str) -> None:
        if not condition:
            raise AssertionError(f"{self.method} at {self.spec}: {promise}")

    def require_bound(self, weight: Tensor, what: str) -> None:
        """Root mean square error of every group against the worst of rounding to nearest."""
        stored = self.quantize(weight)
        wide, numbers = weight.float(), stored.dequantize().float()
        self.require(numbers.isfinite().all(), f"{what} became infinite or NaN")
        largest = grid.tiles(wide, stored.spec).abs().amax(-1)
        rounding, dtype = 2 * torch.finfo(SCALE_DTYPES[stored.spec.scale.dtype]).eps, torch.finfo(weight.dtype)
        if self.is_nested:  # one group's scale is stored in units of its neighbours'
            largest, rounding = largest.amax(), 2.0 ** (2 - (self.spec.scale.bits or 8) / 2)
        error = grid.tiles(numbers - wide, stored.spec).square().mean(-1).sqrt()
        bound = (self.slack * worst_error(stored.spec) + rounding + dtype.eps) * largest
        excess = float((error - bound).max())
        self.require(excess <= dtype.tiny, f"{what}: error {excess:.2e} over the bound")


# -------------------------------------------------------------------- weights


def _normal(*shape: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _weights(case: _Case) -> Iterator[tuple[str, Tensor]]:
    normal = _normal(6, case.width)
    yield "a normal weight", normal
    yield "a heavy-tailed weight", normal / _normal(6, case.width).flip(-1).abs().clamp_min(0.005)
    yield "a float16 weight", normal.half()
    yield "a bfloat16 weight", normal.bfloat16()
    yield "a weight of one row", normal[:1]
    yield "a weight of one sign", normal.abs() + 0.01
    if case.spec.vector == 1 and (not case.is_nested or case.spec.scale.dynamic):
        yield "a weight of odd width", _normal(5, 37)
        yield "a narrow weight", _normal(7, 3)
    if not case.is_nested:  # scales that float16 cannot hold become float32 ones; nested ones have no such variant
        yield "a tiny weight", normal * 1e-7
        yield "a huge weight", normal * 1e6


# -------------------------------------------------------------------- promises


def _error_is_bounded(case: _Case) -> None:
    for what, weight in _weights(case):
        if not case.spec.fit(weight.shape).is_block or weight.shape[-1] >= case.width:
            case.require_bound(weight, what)


def _is_a_weight_again(case: _Case) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = _normal(4, case.width).to(dtype)
        before = weight.clone()
        first, second = case.quantize(weight), case.quantize(weight)
        case.require(first.shape == weight.shape and first.dtype == dtype, f"{dtype} lost its shape or dtype")
        case.require(torch.equal(weight, before), "the weight was changed")
        same = all(torch.equal(part.view(torch.uint8), second.parts[name].view(torch.uint8))
                   for name, part in first.parts.items() if part.ndim)  # fmt: skip
        case.require(same, "the same weight got other codes the second time")


def _zeros_stay_zero(case: _Case) -> None:
    weight = _normal(6, case.width)
    case.require((case.numbers(torch.zeros_like(weight)) == 0).all(), "a weight of zeros is not zero")
    weight[2] = 0
    if case.spec.rows == 1:
        case.require((case.numbers(weight)[2] == 0).all(), "a row of zeros is not zero")
    weight[:, ::3] = 0
    case.require_bound(weight, "a weight with columns of zeros")


def _constants_stay_constant(case: _Case) -> None:
    weight = torch.tensor([[0.3], [-0.02], [1.0], [0.0]]).expand(4, case.width).clone()
    case.require_bound(weight, "a weight of constant rows")
    if case.spec.book is None and case.spec.rows == 1 and not case.is_nested:
        rounding = 2 * torch.finfo(SCALE_DTYPES[case.spec.scale.dtype]).eps
        close = torch.allclose(case.numbers(weight), weight, rtol=rounding, atol=0)
        case.require(close, "a row of one value came back as another")


def _an_outlier_hurts_its_own_group(case: _Case) -> None:
    weight = _normal(6, case.width)
    without = case.numbers(weight)
    weight[1, 3] = 1e3
    case.require_bound(weight, "a weight with an outlier")
    if case.rows_are_independent:
        others = [row for row in range(6) if row != 1]
        case.require(torch.equal(case.numbers(weight)[others], without[others]), "an outlier changed another row")


def _rows_are_independent(case: _Case) -> None:
    if not case.rows_are_independent:
        return
    weight = 8 * _normal(2, 9, case.width)
    together = case.numbers(weight)
    alone = torch.stack([torch.stack([case.numbers(row[None])[0] for row in matrix]) for matrix in weight])
    case.require(torch.equal(together, alone), "a row alone, or in a stack, got other codes than among others")


def _transposed_is_the_same(case: _Case) -> None:
    weight = _normal(6, case.width)
    turned = case.quantize(weight.t().contiguous(), is_transposed=True).dequantize()
    case.require(torch.equal(turned, case.numbers(weight).t()), "a transposed weight got other codes")


def _refuses_what_is_not_finite(case: _Case) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = _normal(4, case.width)
        weight[1, 2] = bad
        try:
            case.quantize(weight)
        except WeightError as error:
            case.require('"weight" holds 1 NaN or infinite' in str(error), f"no name in the error: {error}")
        else:
            case.require(False, f"a weight with {bad} was accepted")


_CHECKS = (
    _is_a_weight_again,
    _error_is_bounded,
    _zeros_stay_zero,
    _constants_stay_constant,
    _an_outlier_hurts_its_own_group,
    _rows_are_independent,
    _transposed_is_the_same,
    _refuses_what_is_not_finite,
)


# -------------------------------------------------------------------- exactness


def _on_the_grid(case: _Case) -> None:
    weight = on_grid(case.spec, (6, case.width))
    case.require(torch.equal(case.numbers(weight), weight), "a weight on the grid was not stored exactly")


def on_grid(spec: WeightSpec, shape: tuple[int, int]) -> Tensor:
    """A random weight that `spec` holds exactly and whose every group uses the outermost levels."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = spec.groups(shape)
    scale = 2.0 ** -torch.randint(2, 8, (rows, columns), generator=generator)
    zero = None
    if not spec.is_symmetric:
        zero = torch.randint(0, 2**spec.bits, scale.shape, generator=generator).float()
        zero = zero * scale if spec.zero == "min" else zero
    book = spec.book
    if book is not None and book.float_dtype is not None:
        codes = (book.largest * torch.randn(shape, generator=generator)).clamp(-book.largest, book.largest)
        codes[:, 0 :: spec.group or shape[1]] = book.largest
        return storage.combine(codes.to(book.float_dtype).float(), scale, zero, spec)
    levels = torch.tensor(book.levels) if book is not None else torch.arange(2.0**spec.bits)
    picked = torch.randint(0, len(levels), shape, generator=generator)
    picked[:, 0 :: spec.group or shape[1]] = int((levels if book is None else -levels.abs()).argmin())
    picked[:, 1 :: spec.group or shape[1]] = int(levels.argmax())
    return storage.combine(storage.levels(picked.to(torch.uint8), spec), scale, zero, spec)
