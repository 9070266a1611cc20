"""Calibrated quantization of a model in memory: capture, groups, and the stages one after another.

Routes, the first that works:
1. one graph, batches of one shape: sequential, piece by piece with the quantized pieces before (`sequential.py`);
2. several graphs, or batches of several shapes: one stage, statistics of the float model;
3. nothing that dynamo can trace: the same with module hooks, and no scale groups.
The report says which it was and why.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptqc.calibrate import moved, signature
from ptqc.capture import CapturedGraph, capture
from ptqc.engine.grouping import groups_for
from ptqc.engine.in_memory import InMemory
from ptqc.engine.jobs import Job, jobs_of
from ptqc.engine.report import Report
from ptqc.engine.sequential import run_sequential
from ptqc.engine.work import Stage
from ptqc.errors import PtqcError, first_line
from ptqc.groups import ScaleGroup
from ptqc.passes.groups.check import model_check
from ptqc.passes.observe.run import observe
from ptqc.program import Program, program
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Rule
from ptqc.sites import Site

__all__ = ["OnProgress", "quantize_calibrated"]

log = logging.getLogger("ptqc")

Batch = Mapping[str, Tensor]
OnProgress = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def quantize_calibrated(
    model: nn.Module,
    work: Sequence[tuple[Site, Rule]],
    batches: Sequence[Batch],
    *,
    is_sequential: bool = True,
    on_progress: OnProgress = lambda what, done, total: None,
) -> tuple[dict[str, QuantTensor], Report]:
    """Quantize the weights of `work` with statistics of `batches`. The model changes only if all goes well.

    is_sequential: quantize piece by piece, each seeing the quantized pieces before it, where that is possible.
    Returns the quantized weights by name, and what happened.
    """
    jobs = jobs_of(work)
    weights = InMemory(model, [site for site, _ in work], jobs)
    report = Report()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            batches = [moved(batch, device) for batch in batches]
            view = _view(model, batches, report)
            groups = groups_for(model, view.programs, batches[0], jobs, is_whole=view.can_be_cut)
            if is_sequential and view.can_be_cut:
                report.route = "one graph, in pieces"
                run_sequential(view.programs[0], batches, jobs, groups, weights, report, on_progress)
            else:
                _one_stage(model, view, batches, jobs, groups, weights, report, on_progress)
    finally:
        model.train(was_training)
    for line in report.notes:
        log.warning(line)
    if len(report.skipped) == len(jobs):
        raise PtqcError(f"nothing could be quantized; {next(iter(report.skipped.values()))}")
    return weights.commit(), report


@dataclass(frozen=True)
class _View:
    """What capture saw. programs: empty where the graphs cannot be made functional."""

    programs: tuple[Program, ...] = ()
    can_be_cut: bool = False


def _view(model: nn.Module, batches: Sequence[Batch], report: Report) -> _View:
    graphs = _captured(model, batches[0], report)
    programs: list[Program] = []
    for graph in graphs:
        try:
            programs.append(program(graph, model, batches[0]))
        except Exception as error:  # an operator without shapes fails in any way
            report.note(f"a graph of the model cannot be analysed ({first_line(error)[:120]}); no scale groups")
            return _View()
    if len(graphs) != 1:
        broken = next((graph.stopped_by for graph in graphs if graph.stopped_by), None)
        report.route = f"{len(graphs)} graphs" + (f" (first break: {broken})" if broken else "")
        if graphs:
            report.note(f"the model runs as {len(graphs)} graphs ({broken}); statistics are those of the float model")
        return _View(tuple(programs))
    report.route = "one graph, at once"
    if programs[0].unknown:
        report.note("the graph takes values that are neither parameters, buffers nor inputs; not cut into pieces")
        return _View(tuple(programs))
    if len({signature(batch) for batch in batches}) > 1:
        report.note(
            "the calibration batches differ in shape, so statistics are those of the float model; "
            "batches of one shape are calibrated piece by piece"
        )
        return _View(tuple(programs))
    return _View(tuple(programs), can_be_cut=True)


def _captured(model: nn.Module, batch: Batch, report: Report) -> list[CapturedGraph]:
    try:
        return capture(model, batch)
    except Exception as error:  # what dynamo does not understand fails in any way; the model itself may well run
        model(**batch)  # raises by itself if the batch is at fault
        report.route = "module hooks"
        report.note(
            f"the model cannot be traced ({first_line(error)[:120]}); statistics from module hooks, no scale groups"
        )
        return []


def _one_stage(
    model: nn.Module,
    view: _View,
    batches: Sequence[Batch],
    jobs: Sequence[Job],
    groups: Sequence[ScaleGroup],
    weights: InMemory,
    report: Report,
    on_progress: OnProgress,
) -> None:
    named = dict(model.named_parameters())
    wanted = {named[job.name]: job.needs for job in jobs if job.needs}
    recorder = observe(model, batches, wanted, progress=lambda done, total: on_progress("observing", done, total))
    check = model_check(model, view.programs, batches[0]) if groups else None
    done = 0

    def on_weight(name: str) -> None:
        nonlocal done
        done += 1
        on_progress(f"quantizing {name}", done, len(jobs))

    def statistics(name: str) -> Mapping[str, Tensor]:
        return recorder.statistics(named[name]) if named[name] in wanted else {}

    Stage(jobs, groups, weights, statistics, report, check, on_weight).run()
