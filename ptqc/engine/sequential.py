"""Sequential calibration: piece by piece, each observed with the quantized pieces before it.

For each piece, in the order of the program:

1. the float piece runs on what every batch has live there, with observers at the inputs of its weights;
2. the stage's work: transforms, then codes for every weight;
3. the piece runs again as it now is, and what it gives takes the place of what it took.

So errors of earlier pieces are seen, and compensated, by later ones (GPTQ: Frantar, Ashkboos, Hoefler, Alistarh, 2022,
arXiv:2210.17323, section 4). Observers of one piece exist at a time. Under torchrun every process runs its share of the
batches, and all of them do the same work with the statistics of all batches.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ptqc.calibrate import shard
from ptqc.engine.activations import Activations
from ptqc.engine.checks import piece_check
from ptqc.engine.jobs import Job, Weights
from ptqc.engine.pieces import Division, Piece, cut, span_of
from ptqc.engine.report import Report
from ptqc.engine.work import Check, Stage
from ptqc.groups import ScaleGroup
from ptqc.passes.observe.recorder import Recorder
from ptqc.passes.observe.run import observed
from ptqc.program import Program
from ptqc.qtensor import QuantTensor
from ptqc.weights import weight_uses

__all__ = ["Checkpoints", "Plan", "plan_pieces", "run_sequential"]

log = logging.getLogger("ptqc")

Batch = Mapping[str, Any]
OnProgress = Callable[[str, float, float], None]


class Checkpoints(Protocol):
    """Keeps finished pieces, so that a run that died goes on where it was."""

    def restore(self, piece: Piece, names: Sequence[str]) -> Mapping[str, Any] | None:
        """Put a piece that is finished back into the weights. names: of its weights to quantize.

        Returns what was said of it; None if it is not finished.
        """
        ...

    def keep(self, piece: Piece, names: Sequence[str], said: Mapping[str, Any]) -> None:
        """A piece is finished. said: of it, in plain values."""
        ...

    def leave(self, piece: Piece) -> None:
        """Nothing more will be asked of the piece's parameters, but for those that a later piece reads too."""
        ...


class _NoCheckpoints:
    def restore(self, piece: Piece, names: Sequence[str]) -> Mapping[str, Any] | None:
        return None

    def keep(self, piece: Piece, names: Sequence[str], said: Mapping[str, Any]) -> None: ...

    def leave(self, piece: Piece) -> None: ...


@dataclass(frozen=True, eq=False)
class Plan:
    """A division with the work in each piece. jobs, groups: by the index of the piece."""

    division: Division
    jobs: Mapping[int, Sequence[Job]]
    groups: Mapping[int, Sequence[ScaleGroup]]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces up to the last one with work; nobody needs what comes after."""
        return self.division.pieces[: max(self.jobs, default=-1) + 1]


def plan_pieces(program: Program, jobs: Sequence[Job], groups: Sequence[ScaleGroup], report: Report) -> Plan:
    """Cut a program so that no scale group is cut, and give every job and group to a piece.

    A weight that several pieces read is quantized with the first whose product reads it; one that none reads, with the
    first piece of all. What had to be given up goes to the report.
    """
    spans = {group: span for group in groups if group.kind != "refused" and (span := span_of(program, group))}
    division = cut(program, spans.values())
    homes = _homes(division)
    placed: dict[int, list[Job]] = {}
    for job in jobs:
        placed.setdefault(homes.get(job.name, 0), []).append(job)
        readers = division.shared.get(job.name)
        if readers:
            report.note(f"read by {len(readers)} pieces of the model; statistics are those of the first", job.name)
    kept: dict[int, list[ScaleGroup]] = {}
    for group in groups:
        home = _home_of(group, division)
        if home is not None:
            kept.setdefault(home, []).append(group)
        elif group.kind != "refused":
            reason = "spans too much of the model" if group in spans else "is not in the graph"
            report.note(f"the scale group of {group.names[0]} {reason} and is left alone")
    return Plan(division, placed, kept)


def _homes(division: Division) -> dict[str, int]:
    """For every parameter the piece in which it is to be quantized."""
    multiplied: dict[str, int] = {}
    read: dict[str, int] = {}
    for piece in division.pieces:
        own = piece.program
        for use in weight_uses(own.graph, own.parameters):
            if use.contractions:
                multiplied.setdefault(own.names[use.placeholder], piece.index)
        for name in piece.parameters:
            read.setdefault(name, piece.index)
    return read | multiplied


def _home_of(group: ScaleGroup, division: Division) -> int | None:
    """The piece that reads every parameter of a group."""
    names = {entry.name for entry in (*group.producer, *group.consumers)}
    return next((piece.index for piece in division.pieces if names <= set(piece.parameters)), None)


def run_sequential(
    program: Program,
    batches: Sequence[Batch],
    jobs: Sequence[Job],
    groups: Sequence[ScaleGroup],
    weights: Weights,
    report: Report,
    on_progress: OnProgress = lambda what, done, total: None,
    *,
    checkpoints: Checkpoints | None = None,
    plan: Plan | None = None,
    activations: Activations | None = None,
) -> None:
    """Quantize the weights of `jobs` piece by piece.

    batches: all of one shape, that of the program. Results go to `weights`, what happened to `report`. on_progress:
    called with what is being done, how much is done, and how much there is, in parameters of the pieces. checkpoints:
    where finished pieces are kept. plan: as `plan_pieces` made it. activations: where values between pieces are kept.
    """
    mine = shard(batches)
    made = plan if plan is not None else plan_pieces(program, jobs, groups, report)
    work = _Work(weights, report, mine, checkpoints or _NoCheckpoints(), _Progress.of(made, on_progress))
    with torch.no_grad(), activations or Activations(len(mine)) as store:
        for piece in made.pieces:
            is_last = piece is made.pieces[-1]
            work.run(piece, made.jobs.get(piece.index, ()), made.groups.get(piece.index, ()), store)
            if not is_last:
                work.replay(piece, store, _read_later(piece, made.pieces))
            work.checkpoints.leave(piece)
            work.progress.finish(piece)


def _read_later(piece: Piece, pieces: Sequence[Piece]) -> frozenset[str]:
    return frozenset(name for later in pieces[piece.index + 1 :] for name in later.takes)


@dataclass
class _Progress:
    """How far a run is: observing, quantizing and running again count 3, 6 and 1 tenths of a piece's parameters."""

    sizes: Mapping[int, int]
    report: OnProgress
    done: int = 0

    @staticmethod
    def of(plan: Plan, report: OnProgress) -> "_Progress":
        """The progress of a plan, none made yet."""
        sizes = {}
        for piece in plan.pieces:
            sizes[piece.index] = sum(value.numel() for value in piece.program.parameters.values())
        return _Progress(sizes, report)

    def at(self, piece: Piece, share: float, what: str) -> None:
        done = self.done + share * self.sizes[piece.index]
        self.report(f"{what} (piece {piece.index + 1} of {len(self.sizes)})", done, sum(self.sizes.values()))

    def finish(self, piece: Piece) -> None:
        self.at(piece, 1.0, "running")
        self.done += self.sizes[piece.index]


@dataclass
class _Work:
    """What every piece of a run shares. batches: those of this process, each with its number."""

    weights: Weights
    report: Report
    batches: Sequence[tuple[int, Batch]]
    checkpoints: Checkpoints
    progress: _Progress
    _first: dict[str, Tensor] = field(default_factory=dict)

    def run(self, piece: Piece, jobs: Sequence[Job], groups: Sequence[ScaleGroup], store: Activations) -> None:
        """Observe and quantize a piece, unless it is finished already."""
        names = [job.name for job in jobs]
        if not jobs:
            return
        said = self.checkpoints.restore(piece, names)
        if said is not None:
            log.info("piece %d was finished before", piece.index + 1)
            self.report.add(Report.from_json(said, groups))
            return
        own = Report()
        statistics = self._observe(piece, jobs, store, own)
        check = self._check(piece, store) if groups else None
        done = 0

        def on_weight(name: str) -> None:
            nonlocal done
            done += 1
            self.progress.at(piece, 0.3 + 0.6 * done / len(jobs), f"quantizing {name}")

        def known(name: str) -> Mapping[str, Tensor]:
            return statistics.get(name, {})

        Stage(jobs, groups, self.weights, known, own, check, on_weight).run()
        self.checkpoints.keep(piece, names, own.to_json(groups))
        self.report.add(own)

    def _observe(
        self, piece: Piece, jobs: Sequence[Job], store: Activations, report: Report
    ) -> dict[str, Mapping[str, Tensor]]:
        """Statistics of the input of every weight that wants some, by name."""
        read = set(piece.parameters)
        wanted = {job.name: job.needs for job in jobs if job.needs and job.name in read}
        if not wanted:
            return {}
        floats = runnable({name: self.weights.current(name) for name in piece.parameters})
        recorder = Recorder({floats[name]: needs for name, needs in wanted.items()})
        module = observing(piece, recorder, wanted)
        for place, (number, batch) in enumerate(self.batches):
            recorder.begin(number, batch)
            module(*piece.arguments(store.values(place), floats, batch))
            self.progress.at(piece, 0.3 * (place + 1) / len(self.batches), "observing")
        recorder.all_reduce()
        found = _gathered(recorder, {name: floats[name] for name in wanted}, report)
        recorder.close()
        return found

    def _check(self, piece: Piece, store: Activations) -> Check:
        """Proves folds on the piece itself, with the first batch."""
        now = _plain({name: self.weights.current(name) for name in piece.parameters})
        return piece_check(piece, store.values(0), now, self.batches[0][1])

    def replay(self, piece: Piece, store: Activations, keep: frozenset[str]) -> None:
        """Run a piece as it now is, and keep what later pieces read."""
        now = runnable({name: self.weights.current(name) for name in piece.parameters})
        for place, (_, batch) in enumerate(self.batches):
            store.update(place, piece.run(store.values(place), now, batch), keep)
            self.progress.at(piece, 0.9 + 0.1 * place / len(self.batches), "running")


def _gathered(recorder: Recorder, floats: Mapping[str, Tensor], report: Report) -> dict[str, Mapping[str, Tensor]]:
    found: dict[str, Mapping[str, Tensor]] = {}
    for name, value in floats.items():
        reason = recorder.reason(value)
        if reason is not None:
            report.note(f"not observed: {reason}", name)
        found[name] = recorder.statistics(value)
    return found


def observing(piece: Piece, recorder: Recorder, names: Iterable[str]) -> Callable[..., Any]:
    """The module of a piece with observers at the inputs of the named weights, and nothing but what these need: the
    last products of a piece are not computed."""
    own, chosen = piece.program, set(names)
    wanted = {node for node, name in own.names.items() if name in chosen}
    module = observed(own.module, own.parameters, recorder, wanted)
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((),)
    # The graph is functional: only observers do anything. Torch would keep attention, which might draw random numbers.
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output", "call_module"))
    module.recompile()
    return module


def runnable(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters to run a piece with on many batches: quantized weights as floats, made once, wherever that is the
    same. Where the input is quantized as well it is not, and the weight stays as it is."""
    return {
        name: value.dequantize() if isinstance(value, QuantTensor) and value.surroundings.act.dtype is None else value
        for name, value in values.items()
    }


def _plain(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.dequantize() if isinstance(value, QuantTensor) else value for name, value in values.items()}
