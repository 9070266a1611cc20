"""Quantizing a model folder with calibration data, a piece of the model at a time.

1. the model is built without weights and captured on the first batch as one graph, without running it;
2. the graph is cut into pieces (`ptqc.engine.pieces`); weights of one piece at a time are read and quantized with
   statistics of its inputs behind the quantized pieces before it (`ptqc.engine.sequential`);
3. each finished piece is kept in a work folder beside the output, with what there is to report of it. A run that was
   killed, started again with the same arguments, takes the finished pieces from there, and writes and reports what it
   would have written and reported undisturbed;
4. at the end the output is written from the pieces and the tensors that nothing changed, and the work folder goes. If
   only that was left to do (`ptqc.folders.finished`), nothing else is done.

Where tensors of the folder are not the parameters of the model one by one, where the model is not one graph, or where
batches differ in shape, the model is loaded whole instead, and the log says so. Such a run starts over when killed.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ptqc.assign import assign, nothing_to_do
from ptqc.calibrate import fingerprint, signature
from ptqc.capture import CapturedGraph, capture
from ptqc.engine.activations import Activations
from ptqc.engine.grouping import groups_for
from ptqc.engine.jobs import jobs_of
from ptqc.engine.report import Report
from ptqc.engine.sequential import Plan, plan_pieces, run_sequential
from ptqc.errors import PtqcError, first_line
from ptqc.folders.architecture import build_empty, build_unfilled, planned_dtype
from ptqc.folders.artefacts import Artefact, WorkFolder, work_folder_of
from ptqc.folders.checkpoint import write_folder
from ptqc.folders.conversion import (
    SHARE_OF_CODES,
    OnProgress,
    Request,
    StreamReport,
    copied,
    model_dtype,
    refuse_source,
    write_config,
)
from ptqc.folders.finished import finished_report, record_output
from ptqc.folders.folder import ModelFolder, copy_companions, open_folder
from ptqc.folders.manifest import Manifest, StoredWeight
from ptqc.folders.safefile import TensorEntry
from ptqc.folders.shards import Append, Block
from ptqc.folders.shelf import Shelf
from ptqc.folders.sources import Sources, direct_sources
from ptqc.folders.staging import refuse_target, staged, unwritable
from ptqc.folders.whole import quantize_whole
from ptqc.program import Program, program
from ptqc.recipe import Recipe, Rule, recipe_rows
from ptqc.sites import Site, Skipped, find_sites, select_sites

__all__ = ["quantize_folder_calibrated"]

log = logging.getLogger("ptqc")


def quantize_folder_calibrated(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe,
    batches: Sequence[Mapping[str, Tensor]],
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    on_progress: OnProgress | None = None,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    work_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> StreamReport:
    """Quantize the model in `source` (a folder, or a hub repository "organisation/name") into the folder `out`.

    recipe: rules whose methods and transforms may read statistics. batches: model inputs by name. include, exclude:
    patterns as for `ptqc.quantize`. on_progress: bytes of the source done, all bytes, and what is being done. work_dir:
    where finished pieces are kept until the end, by default beside `out`. The same arguments give the same bytes,
    whether a run was killed on the way or not.

    Raises: CheckpointError for a folder that cannot be read or written, WeightError and SpecError naming the weight;
    nothing is left of `out` then, finished pieces are kept.
    """
    request = Request.of(
        recipe, include=include, exclude=exclude, on_progress=on_progress, overwrite=overwrite,
        max_shard_bytes=max_shard_bytes, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if not batches:
        raise PtqcError("there is no calibration data")
    stored, target = open_folder(source), Path(out).resolve()
    refuse_source(stored, target)
    path = work_folder_of(target) if work_dir is None else Path(work_dir).resolve()
    folder = WorkFolder(path, _base(stored, batches, request))
    done = finished_report(folder, request, target)
    if done is not None:
        with folder:
            folder.remove()
        log.warning("%s is complete already; removed %s, which the run that wrote it had left", target, path)
        return done
    refuse_target(target, overwrite)
    view = _view(stored, batches, request)
    if isinstance(view, str):
        log.warning("%s: %s; loading the whole model instead of a piece at a time", stored.path, view)
        return quantize_whole(stored, target, request, batches)
    try:
        with folder:
            report = _quantize_pieces(view, folder, target, batches, request)
            folder.remove()
    except PtqcError:
        raise
    except OSError as error:
        raise unwritable(folder.path, error) from error
    return report


# -------------------------------------------------------------------- what there is to do


@dataclass(frozen=True, eq=False)
class _View:
    """A folder whose model can be cut. dtypes: of every parameter in the output, by name."""

    stored: ModelFolder
    sources: Sources
    model: Any
    program: Program
    work: Sequence[tuple[Site, Rule]]
    skipped: tuple[Skipped, ...]

    def dtype_of(self, name: str) -> torch.dtype:
        """What transformers loads a parameter as."""
        usual = model_dtype(self.stored) or self.sources.entries[name].dtype
        return planned_dtype(self.model, name, usual)


def _view(stored: ModelFolder, batches: Sequence[Mapping[str, Tensor]], request: Request) -> _View | str:
    """The folder as pieces see it, or the reason why it has to be loaded whole."""
    sources = direct_sources(build_empty(stored, request.trust_remote_code), stored)
    if isinstance(sources, str):
        return sources
    if len({signature(batch) for batch in batches}) > 1:
        return "the calibration batches differ in shape"
    model = build_unfilled(stored, request.trust_remote_code)
    _fill_buffers(model, sources)
    graph = _captured(model, batches[0])
    if isinstance(graph, str):
        return graph
    whole = program(graph, model, batches[0])
    missing = [name for name in whole.names.values() if name not in sources.entries]
    if whole.unknown or missing:
        return f"{missing[0]} is not stored" if missing else "the graph takes values of unknown origin"
    sites, skipped = select_sites(*find_sites(model, graphs=[graph]), model, request.include, request.exclude)
    work, left = assign(sites, request.recipe, has_data=True)
    if not work:
        raise PtqcError(nothing_to_do([*skipped, *left]))
    return _View(stored, sources, model, whole, work, (*skipped, *left))


def _fill_buffers(model: nn.Module, sources: Sources) -> None:
    for name, buffer in model.named_buffers():
        if name in sources.entries:
            buffer.copy_(sources.entries[name].read())


def _captured(model: nn.Module, batch: Mapping[str, Tensor]) -> CapturedGraph | str:
    try:
        graphs = capture(model, batch, is_run=False)
    except Exception as error:  # what dynamo does not understand fails in any way
        return f"the model cannot be traced ({first_line(error)[:120]})"
    if len(graphs) != 1 or graphs[0].stopped_by is not None:
        return f"the model is not one graph ({graphs[0].stopped_by if graphs else 'it runs nothing'})"
    return graphs[0]


def _base(stored: ModelFolder, batches: Sequence[Mapping[str, Tensor]], request: Request) -> str:
    """Hash of everything that the bytes of the output depend on."""
    files = {}
    for path in sorted({entry.path for entry in stored.entries.values()}):
        state = path.stat()
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
        files[path.name] = [state.st_size, state.st_mtime_ns, hashlib.sha256(header).hexdigest()]
    parts = {
        "versions": [version("ptqc"), torch.__version__, transformers.__version__],
        "files": files,
        "config": stored.config,
        "rules": [repr(rule) for rule in request.recipe],
        "include": request.include,
        "exclude": request.exclude,
        "batches": fingerprint(batches),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------- a piece at a time


def _quantize_pieces(
    view: _View, folder: WorkFolder, target: Path, batches: Sequence[Mapping[str, Tensor]], request: Request
) -> StreamReport:
    jobs = jobs_of(view.work)
    notes = Report()
    groups = groups_for(view.model, [view.program], batches[0], jobs, is_whole=True)
    plan = plan_pieces(view.program, jobs, groups, notes)
    shelf = _shelf(view, plan, folder)
    total = sum(entry.nbytes for entry in view.sources.entries.values())

    def on_step(what: str, done: float, whole: float) -> None:
        request.on_progress(int(SHARE_OF_CODES * total * done / whole), total, what)

    run_sequential(
        view.program, batches, jobs, groups, shelf, notes, on_step,
        checkpoints=shelf, plan=plan, activations=Activations(len(batches), folder=folder.path),
    )  # fmt: skip
    for line in notes.notes:
        log.warning(line)
    skipped = [Skipped(name, reason) for name, reason in notes.skipped.items()]

    def reported(weights: dict[str, StoredWeight], written: int) -> StreamReport:
        return StreamReport(
            weights, (*view.skipped, *skipped), total, written,
            is_streamed=True, pieces=len(plan.jobs), resumed=shelf.resumed, notes=tuple(notes.notes),
        )  # fmt: skip

    return _write(view, shelf.artefacts, target, request, folder, reported)


def _shelf(view: _View, plan: Plan, folder: WorkFolder) -> Shelf:
    names = [name for name, _ in view.model.named_parameters()]
    dtypes = {name: view.dtype_of(name) for name in names if name in view.sources.entries}
    biases = {site.name: bias for site, _ in view.work if (bias := site.bias_in(view.model)) is not None}
    jobs = frozenset(site.name for site, _ in view.work)
    return Shelf(view.sources.entries, dtypes, biases, jobs, frozenset(plan.division.shared), folder)


def _write(
    view: _View,
    artefacts: Mapping[int, Artefact],
    target: Path,
    request: Request,
    folder: WorkFolder,
    reported: Callable[[dict[str, StoredWeight], int], StreamReport],
) -> StreamReport:
    """Write the output, and note in the work folder that it is complete. reported: the report, from the quantized
    weights by name and the bytes of the tensor files."""
    made: dict[str, Artefact] = {}
    weights: dict[str, StoredWeight] = {}
    for artefact in artefacts.values():
        own = artefact.manifest.weights
        parts = Manifest(own).layout()
        weights |= own
        made |= dict.fromkeys([*own, *(name for name in artefact.entries if name not in parts)], artefact)
    weights = {site.name: weights[site.name] for site, _ in view.work if site.name in weights}
    entries = view.sources.entries
    blocks = [_block(name, entry, made.get(name), weights.get(name)) for name, entry in entries.items()]
    total, done = sum(block.source_bytes for block in blocks), 0

    def on_block(block: Block) -> None:
        nonlocal done
        done += block.source_bytes
        request.on_progress(int(SHARE_OF_CODES * total + (1 - SHARE_OF_CODES) * done), total, block.name)

    with staged(target, overwrite=request.overwrite) as staging:
        written = write_folder(staging, blocks, request.max_shard_bytes, target, on_block)
        copy_companions(view.stored.path, staging, with_code=request.trust_remote_code)
        manifest = Manifest(weights, view.sources.tied, recipe_rows(request.recipe))
        write_config(staging, view.stored, manifest.to_config(), model_dtype(view.stored))
        report = reported(weights, written)
        record_output(folder, request, staging, report)
    return report


def _block(name: str, entry: TensorEntry, artefact: Artefact | None, weight: StoredWeight | None) -> Block:
    if artefact is None:
        return copied(name, entry)
    names = [name] if weight is None else list(weight.layout(name))
    found = {one: artefact.entries[one] for one in names}

    def produce(append: Append) -> None:
        for one, part in found.items():
            for piece in part.pieces():
                append(one, piece)

    return Block(name, {one: (part.shape, part.dtype) for one, part in found.items()}, produce, entry.nbytes)
