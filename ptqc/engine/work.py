"""The work on one stage: transforms on scale groups, then codes for every weight.

A stage is a set of weights whose statistics are known together: those of a piece in sequential mode, all of them
otherwise. The order: scales of each transform, checked and folded or left as a multiply at run time; then, weight by
weight, what stands around it, clipping, codes, and corrections of biases.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.activations import static_scale
from ptqc.engine.jobs import Job, Weights, transforms_of
from ptqc.engine.report import GroupOutcome, Report
from ptqc.engine.starved import informed
from ptqc.errors import PtqcError, SpecError
from ptqc.groups import ScaledParameter, ScaleGroup, rescaled, spread
from ptqc.methods import quantize_weight
from ptqc.passes.groups.check import folded
from ptqc.qtensor import QuantTensor
from ptqc.surroundings import Surroundings, stored_matrix, stored_statistics
from ptqc.transforms import Member, Transform, surround

__all__ = ["Check", "Stage"]

log = logging.getLogger("ptqc")

Statistics = Mapping[str, Tensor]
Check = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float]
"""check(before, after): largest relative change of the outputs when parameters, given by name in float64, change from
one set of values to the other."""

_TOLERANCE = 1e-9
"""Largest relative change of an output that a fold may cause in float64."""


@dataclass
class Stage:
    """One stage at work.

    jobs: the weights. groups: scale groups that lie in this stage. statistics: of the input of a weight, by its name;
    the same object for weights that read one value. check: proves a fold on the stage's own graph (None: not checked).
    """

    jobs: Sequence[Job]
    groups: Sequence[ScaleGroup]
    weights: Weights
    statistics: Callable[[str], Statistics]
    report: Report
    check: Check | None = None
    on_weight: Callable[[str], None] = lambda name: None
    _around: dict[str, tuple[Surroundings, dict[str, Tensor]]] = field(default_factory=dict)
    _folded: dict[str, Tensor] = field(default_factory=dict)
    """For every weight the factors by which its columns were multiplied, [in]; its input is divided by them."""
    _known: dict[str, Statistics] = field(default_factory=dict)
    _shared: dict[tuple[object, ...], tuple[object, Statistics]] = field(default_factory=dict)

    def run(self) -> None:
        """Transform and quantize every weight of the stage."""
        for transform in transforms_of(self.jobs):
            self._scale_groups(transform)
        for job in self.jobs:
            self._quantize(job)
            self.on_weight(job.name)

    # ---------------------------------------------------------------- scales

    def _scale_groups(self, transform: Transform) -> None:
        if not transform.has_scale:
            return
        chosen = [pair for group in self.groups if (pair := self._choose(transform, group)) is not None]
        folds = [(group, scale) for group, scale in chosen if group.kind == "fold"]
        for group, scale, error in self._checked(folds):
            if error is not None and not error <= _TOLERANCE:
                self._note(group, transform, "undone", error)
                continue
            self._fold(group, scale)
            self._note(group, transform, "folded", error)
        for group, scale in chosen:
            if group.kind == "run-time":
                self._scale_at_run_time(group, transform, scale)
                self._note(group, transform, "run-time", None)

    def _choose(self, transform: Transform, group: ScaleGroup) -> tuple[ScaleGroup, Tensor] | None:
        """The scale of a group, or None where there is nothing to do for this transform."""
        jobs = {job.name: job for job in self.jobs if transform in job.rule.transforms}
        members = [(jobs[entry.name], entry) for entry in group.consumers if entry.name in jobs]
        if not members:
            return None
        scale = None
        if group.kind != "refused" and all(entry.axis == self._input_axis(job) for job, entry in members):
            seen = [self._priced(job, self._member(job, entry)) for job, entry in members]
            reason = transform.refuses(seen)
            if reason is None:
                scale = transform.scale(seen, group.channels)
            else:
                self.report.note(f"{type(transform).__name__}: {reason}", members[0][0].name)
        if scale is None:
            self._note(group, transform, "left", None)
            return None
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            name = type(transform).__name__
            raise PtqcError(f"{name} chose a scale that is not positive and finite for {', '.join(group.names)}")
        return group, scale

    @staticmethod
    def _input_axis(job: Job) -> int:
        return -2 if job.is_transposed else -1

    def _note(self, group: ScaleGroup, transform: Transform, done: str, error: float | None) -> None:
        name = type(transform).__name__
        self.report.groups.append(GroupOutcome(group, name, done, error))
        if done == "undone":
            log.warning("%s: the fold of %s changes the outputs by %.1e and was undone", name, group.value, error)

    def _checked(self, folds: Sequence[tuple[ScaleGroup, Tensor]]) -> list[tuple[ScaleGroup, Tensor, float | None]]:
        """Each fold with the relative change that it causes: all together, and one by one only if that fails."""
        if self.check is None or not folds:
            return [(group, scale, None) for group, scale in folds]
        error = self._error_of(folds)
        if error <= _TOLERANCE:
            return [(group, scale, error) for group, scale in folds]
        return [(group, scale, self._error_of([(group, scale)])) for group, scale in folds]

    def _error_of(self, folds: Sequence[tuple[ScaleGroup, Tensor]]) -> float:
        assert self.check is not None
        names = {entry.name for group, _ in folds for entry in (*group.producer, *group.consumers)}
        before = {name: self.weights.read(name).double() for name in names}
        after = dict(before)
        for group, scale in folds:
            after |= folded(after, group, scale)
        return self.check(before, after)

    def _fold(self, group: ScaleGroup, scale: Tensor) -> None:
        for entry in (*group.producer, *group.consumers):
            self.weights.fold(entry.name, rescaled(self.weights.read(entry.name), entry, scale))
        for entry in group.consumers:
            factor = spread(scale.float(), entry.channel)
            self._folded[entry.name] = self._folded.get(entry.name, torch.ones_like(factor)) * factor
            self._known.pop(entry.name, None)

    def _scale_at_run_time(self, group: ScaleGroup, transform: Transform, scale: Tensor) -> None:
        jobs = {job.name for job in self.jobs if transform in job.rule.transforms}
        for entry in group.consumers:
            if entry.name in jobs:
                around, extras = self._around.get(entry.name, (Surroundings(), {}))
                factor = 1 / spread(scale.float(), entry.channel)
                extras = extras | {"input_scale": factor * extras.get("input_scale", torch.ones_like(factor))}
                self._around[entry.name] = replace(around, input_scale=True), extras

    # ---------------------------------------------------------------- what a transform sees

    def _matrix(self, job: Job) -> Tensor:
        """The weight [*lead, out, in] float32, folds included."""
        weight = self.weights.read(job.name).float()
        return weight.mT if job.is_transposed else weight

    def _plain_statistics(self, job: Job) -> Statistics:
        """Statistics of the input of a weight after the folds so far."""
        if job.name not in self._known:
            found = informed(job, self.statistics(job.name), self.report)
            if job.name in self._folded:
                factor = self._folded[job.name]
                found = self._once(
                    ("folded", id(found), factor.numpy(force=True).tobytes()), found,
                    lambda: stored_statistics(found, Surroundings(input_scale=True), {"input_scale": 1 / factor}),
                )  # fmt: skip
            self._known[job.name] = found
        return self._known[job.name]

    def _once(self, key: tuple[object, ...], source: object, make: Callable[[], Statistics]) -> Statistics:
        """Weights that read one value and are treated alike share one set of statistics, and so one Hessian."""
        if key not in self._shared:
            self._shared[key] = (source, make())
        return self._shared[key][1]

    def _member(self, job: Job, entry: ScaledParameter | None = None) -> Member:
        """A weight as it would be stored now."""
        around, extras = self._around.get(job.name, (Surroundings(), {}))
        matrix = stored_matrix(self._matrix(job), around, extras)
        statistics = self._surrounded_statistics(job, around, extras)
        channel = None if entry is None else entry.channel
        return Member(job.name, matrix, statistics, job.spec, job.rule.activation, channel)

    def _priced(self, job: Job, member: Member) -> Member:
        """A weight whose Hessian says what errors cost when its method has made up for them (`column_importance`)."""
        price = getattr(job.rule.method, "column_importance", None)
        known = member.statistics
        if price is None or "hessian" not in known:
            return member
        key = ("priced", id(known), job.rule.method)
        return replace(
            member, statistics=self._once(key, known, lambda: {**known, "hessian": torch.diag_embed(price(known))})
        )

    def _surrounded_statistics(self, job: Job, around: Surroundings, extras: Mapping[str, Tensor]) -> Statistics:
        plain = self._plain_statistics(job)
        if around.keeps_weight:
            return plain
        inputs = replace(around, output_rotation=None)
        kept = {name: extras[name] for name in inputs.extra_names if name in extras}
        key = (inputs, id(plain), *(kept[name].numpy(force=True).tobytes() for name in sorted(kept)))
        return self._once(key, plain, lambda: stored_statistics(plain, inputs, kept))

    # ---------------------------------------------------------------- codes

    def _quantize(self, job: Job) -> None:
        rule = job.rule
        assert rule.method is not None
        around, extras = self._surrounded(job)
        member = self._member(job)
        if not getattr(rule.method, "finds_ranges", False):  # clipped weights would be what it makes errors up against
            for transform in rule.transforms:
                member = replace(member, weight=transform.clip(member))
        if rule.activation.is_static:
            extras = extras | {"act_scale": _static_scale(job, member, rule.activation)}
        try:
            made = quantize_weight(member.weight, rule.method, job.spec, name=job.name, statistics=member.statistics)
        except SpecError as error:
            if rule.is_exact:
                raise
            self.report.skipped[job.name] = str(error)
            return
        stored = _dressed(made, job, replace(around, act=rule.activation), extras)
        self._correct(job, stored)
        self.weights.store(job.name, stored)

    def _surrounded(self, job: Job) -> tuple[Surroundings, dict[str, Tensor]]:
        """Run-time scales so far, and what the transforms add."""
        around, extras = surround(job.rule.transforms, self._member(job))
        own, mine = self._around.get(job.name, (Surroundings(), {}))
        self._around[job.name] = replace(around, input_scale=own.input_scale), mine | extras
        return self._around[job.name]

    def _correct(self, job: Job, stored: QuantTensor) -> None:
        for transform in job.rule.transforms:
            if type(transform).correct is Transform.correct:
                continue
            bias = self.weights.bias_of(job.name)
            if bias is None or len(job.shape) > 2:
                self.report.note(f"{type(transform).__name__}: weights without a bias of their own are not corrected")
                continue
            plain = Member(job.name, self._matrix(job), self._plain_statistics(job), job.spec, job.rule.activation)
            numbers = stored.dequantize().float()
            change = transform.correct(plain, numbers.mT if job.is_transposed else numbers)
            if change is not None:
                value = self.weights.read(bias)
                self.weights.fold(bias, (value.float() + change).to(value.dtype))


def _dressed(made: QuantTensor, job: Job, around: Surroundings, extras: Mapping[str, Tensor]) -> QuantTensor:
    """The stored matrix with what stands around it, looking like the parameter."""
    around = replace(around, order=made.surroundings.order)
    held = {name: extras[name] if name in extras else made.extras[name] for name in around.extra_names}
    return made.with_parts(
        made.parts, dtype=job.dtype, is_transposed=job.is_transposed, surroundings=around, extras=held
    )


def _static_scale(job: Job, member: Member, act: ActSpec) -> Tensor:
    """The step of a static activation, from the largest magnitude that calibration has seen."""
    found = member.statistics.get("absmax")
    if found is None:
        raise PtqcError(
            f'"{job.name}": the range of a rotated input is not known; use a dynamic activation scale (int8-token)'
        )
    return static_scale(found, act)
