"""What transforms promise, that two functions are one, and statistics to try methods on: parts of `ptqc.testing`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ptqc.spec import WeightSpec
from ptqc.surroundings import apply, check_extras, steps_undoing, stored_matrix
from ptqc.transforms import Member, Transform

__all__ = ["assert_same_function", "check_transform", "sample_statistics"]


def assert_same_function(
    before: Callable[..., Any], after: Callable[..., Any], batch: Mapping[str, Any] | Sequence[Any], tolerance: float
) -> None:
    """Assert that two functions, modules or graph modules give the same tensors.

    batch: their arguments, by keyword or by position. tolerance: of the largest difference of an output, relative to
    the largest magnitude of it.

    Raises: AssertionError saying which output differs by how much.
    """
    with torch.no_grad():
        expected, found = _outputs(before, batch), _outputs(after, batch)
    if len(expected) != len(found):
        raise AssertionError(f"{len(expected)} tensors became {len(found)}")
    for number, (old, new) in enumerate(zip(expected, found, strict=True)):
        if old.shape != new.shape:
            raise AssertionError(f"output {number}: shape {tuple(old.shape)} became {tuple(new.shape)}")
        wide, change = old.double(), (new.double() - old.double()).abs()
        error = float(change.max() / wide.abs().max().clamp_min(1e-300)) if old.numel() else 0.0
        if not error <= tolerance:  # NaN is not
            raise AssertionError(f"output {number}: relative difference {error:.2e}, allowed are {tolerance:.2e}")


def _outputs(function: Callable[..., Any], batch: Mapping[str, Any] | Sequence[Any]) -> list[Tensor]:
    made = function(**batch) if isinstance(batch, Mapping) else function(*batch)
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]


def sample_statistics(in_features: int, *, rows: int = 256, seed: int = 0) -> dict[str, Tensor]:
    """Every statistic of the contract of methods, of random correlated rows with a few large channels.

    Hessian [in, in], rows [rows, in], count [], the others [in], all float32.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(in_features) + 0.3 * torch.randn(in_features, in_features, generator=generator)
    sample = torch.randn(rows, in_features, generator=generator) @ mixing
    sample[:, :: max(8, in_features // 4)] *= 8
    return _statistics(sample)


def _statistics(rows: Tensor) -> dict[str, Tensor]:
    return {
        "hessian": rows.mT @ rows / len(rows),
        "absmax": rows.abs().amax(0),
        "mean_abs": rows.abs().mean(0),
        "mean": rows.mean(0),
        "mean_square": rows.square().mean(0),
        "percentile": rows.abs().quantile(0.999, dim=0),
        "rows": rows,
        "count": torch.tensor(float(len(rows))),
    }


# -------------------------------------------------------------------- transforms


def check_transform(transform: Transform, spec: str = "int4g16", *, in_features: int = 64) -> None:
    """Assert that a transform keeps its promises.

    Scales are positive, finite float32, one a channel; what stands around a stored matrix can be undone; clipped
    weights and corrections are finite and of the right shape; nothing given is changed; the same input gives the same
    output; channels that are always zero, weights of zeros and rows fewer than channels do no harm.

    Raises: AssertionError saying which promise was broken.
    """
    for what, members in _cases(WeightSpec.parse(spec), in_features):
        case = _Case(transform, what)
        before = [_copied(member) for member in members]
        first, second = case.everything(members), case.everything(members)
        case.require(_equal(first, second), "the same input gave another result the second time")
        case.require(_equal([_copied(member) for member in members], before), "a weight or statistic was changed")


def _cases(spec: WeightSpec, in_features: int) -> Iterator[tuple[str, list[Member]]]:
    generator = torch.Generator().manual_seed(0)
    weights = [0.05 * torch.randn(out, in_features, generator=generator) for out in (32, 48)]
    statistics = sample_statistics(in_features)
    few = _statistics(sample_statistics(in_features)["rows"][:3])
    dead = statistics["rows"].clone()
    dead[:, 1::3] = 0
    channel = torch.arange(in_features)

    def members(weights: Sequence[Tensor], statistics: Mapping[str, Tensor]) -> list[Member]:
        return [Member(f"w{n}", weight, statistics, spec, channel=channel) for n, weight in enumerate(weights)]

    yield "usual weights", members(weights, statistics)
    yield "few rows", members(weights, few)
    yield "channels that are always zero", members(weights, _statistics(dead))
    yield "inputs that are always zero", members(weights, _statistics(torch.zeros_like(dead)))
    yield "weights of zeros", members([torch.zeros_like(weight) for weight in weights], statistics)


def _copied(member: Member) -> list[Tensor]:
    return [member.weight.clone(), *(value.clone() for value in member.statistics.values())]


def _equal(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@dataclass(frozen=True)
class _Case:
    transform: Transform
    what: str

    def require(self, condition: bool | Tensor, promise: str) -> None:
        if not condition:
            raise AssertionError(f"{self.transform} with {self.what}: {promise}")

    def everything(self, members: Sequence[Member]) -> list[Any]:
        """What the transform makes of the members, every step checked."""
        first = members[0]
        return [self._scale(members), self._around(first), self._clip(first), self._correct(first)]

    def _scale(self, members: Sequence[Member]) -> Tensor | None:
        channels = members[0].weight.shape[-1]
        scale = self.transform.scale(members, channels)
        if scale is not None:
            is_right = scale.shape == (channels,) and scale.dtype == torch.float32
            self.require(is_right, "scales must be float32 [channels]")
            self.require((scale.isfinite() & (scale > 0)).all(), "scales must be positive and finite")
        return scale

    def _around(self, member: Member) -> dict[str, Tensor]:
        around, extras = self.transform.around(member)
        check_extras(around, extras, member.weight.shape)
        back = apply(steps_undoing(around, extras), stored_matrix(member.weight, around, extras))
        close = torch.allclose(back, member.weight, rtol=1e-4, atol=1e-6)
        self.require(close, "what stands around the stored matrix does not give the weight back")
        return extras

    def _clip(self, member: Member) -> Tensor:
        clipped = self.transform.clip(member)
        self.require(clipped.shape == member.weight.shape and clipped.isfinite().all(), "a clipped weight is broken")
        return clipped

    def _correct(self, member: Member) -> Tensor | None:
        change = self.transform.correct(member, member.weight.round(decimals=2))
        if change is not None:
            shape = member.weight.shape[:-1]
            self.require(change.shape == shape and change.isfinite().all(), "a correction must be finite, [out]")
        return change
