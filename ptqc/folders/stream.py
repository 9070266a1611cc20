"""Quantizing a model folder tensor by tensor: the float model is never in memory, the folder equals what `save` writes.

1. headers and config are read, and the architecture is built without weights, to learn which tensors are weights;
2. every weight to quantize is read once in pieces: NaN is found before a byte is written, and its spec is final;
3. all sizes being known, the output is written: weights a few rows at a time where the method allows it, everything
   else as it is.

Where the tensors of the folder are not the parameters of the model one by one (experts merged on load), the model is
loaded whole instead, and the log says so.
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ptqc import storage
from ptqc.assign import assign, nothing_to_do
from ptqc.errors import PtqcError, SpecError, WeightError
from ptqc.folders.architecture import build_empty, planned_dtype
from ptqc.folders.checkpoint import write_folder
from ptqc.folders.conversion import (
    OnProgress,
    Request,
    StreamReport,
    copied,
    model_dtype,
    refuse_source,
    write_config,
)
from ptqc.folders.folder import ModelFolder, copy_companions, open_folder
from ptqc.folders.manifest import Manifest, StoredWeight
from ptqc.folders.safefile import TensorEntry
from ptqc.folders.shards import Append, Block
from ptqc.folders.sources import Sources, direct_sources
from ptqc.folders.staging import refuse_target, staged
from ptqc.folders.whole import quantize_whole
from ptqc.methods import Method, hold_scales, rows_at_once
from ptqc.recipe import Recipe, Rule, fitted_spec, recipe_rows
from ptqc.sites import UNKNOWN_USE, Site, Skipped, find_sites, select_sites
from ptqc.spec import WeightSpec
from ptqc.surroundings import stored_matrix

__all__ = ["OnProgress", "StreamReport", "quantize_folder"]

log = logging.getLogger("ptqc")


def quantize_folder(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: Method | None = None,
    spec: WeightSpec | None = None,
    recipe: Recipe | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    on_progress: OnProgress | None = None,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    trust_remote_code: bool = False,
) -> StreamReport:
    """Quantize the model in `source` (a folder, or a hub repository "organisation/name") into the folder `out`.

    method, spec: for every weight, the spec giving way to the nearest group that divides; or a recipe instead.
    include, exclude: patterns as for `ptqc.quantize`. The same source and recipe give the same bytes.

    Raises: CheckpointError for a folder that cannot be read or written, WeightError and SpecError naming the weight;
    nothing is left of `out` then.
    """
    request = Request.of(
        _recipe(method, spec, recipe), include=include, exclude=exclude, on_progress=on_progress, overwrite=overwrite,
        max_shard_bytes=max_shard_bytes, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    stored, target = open_folder(source), Path(out).resolve()
    refuse_source(stored, target)
    refuse_target(target, overwrite)
    model = build_empty(stored, trust_remote_code)
    sites, skipped = select_sites(*find_sites(model), model, request.include, request.exclude)
    work, left = assign(sites, request.recipe)
    sources = direct_sources(model, stored)
    unclear = [entry.name for entry in skipped if entry.reason == UNKNOWN_USE]
    if isinstance(sources, str) or unclear:
        reason = sources if isinstance(sources, str) else f"only running the model shows how {unclear[0]} is used"
        log.warning("%s: %s; loading the whole model instead of one weight at a time", stored.path, reason)
        return quantize_whole(stored, target, request)
    if not work:
        raise PtqcError(nothing_to_do([*skipped, *left]))
    return _quantize_streamed(model, stored, sources, work, (*skipped, *left), target, request)


def _recipe(method: Method | None, spec: WeightSpec | None, recipe: Recipe | None) -> Recipe:
    if recipe is not None and method is None and spec is None:
        return recipe
    if recipe is not None or method is None:
        raise PtqcError("give either a method (with a spec, if it is not to be the method's own) or a recipe")
    return [Rule("*", method, spec if spec is not None else method.spec())]


# -------------------------------------------------------------------- one weight at a time


def _quantize_streamed(
    model: Any,
    stored: ModelFolder,
    sources: Sources,
    work: Sequence[tuple[Site, Rule]],
    skipped: tuple[Skipped, ...],
    target: Path,
    request: Request,
) -> StreamReport:
    dtype = model_dtype(stored)
    with staged(target, overwrite=request.overwrite) as staging:
        blocks, weights = {}, {}
        for name, (site, rule) in {site.name: (site, rule) for site, rule in work}.items():
            entry = sources.entries[name]
            weights[name] = _plan(site, rule, entry, planned_dtype(model, name, dtype or entry.dtype))
            blocks[name] = _quantized(name, entry, weights[name], rule)
        ordered = [blocks.get(name) or copied(name, entry) for name, entry in sources.entries.items()]
        total, done = sum(block.source_bytes for block in ordered), 0

        def on_block(block: Block) -> None:
            nonlocal done
            done += block.source_bytes
            request.on_progress(done, total, block.name)

        written = write_folder(staging, ordered, request.max_shard_bytes, target, on_block)
        copy_companions(stored.path, staging, with_code=request.trust_remote_code)
        manifest = Manifest(weights, sources.tied, recipe_rows(request.recipe))
        write_config(staging, stored, manifest.to_config(), dtype)
    return StreamReport(weights, skipped, total, written, is_streamed=True)


def _plan(site: Site, rule: Rule, entry: TensorEntry, dtype: torch.dtype) -> StoredWeight:
    """How a weight will be stored. Reads it once: its values are checked, and its largest decides the scale type."""
    assert rule.method is not None
    shape = site.stored_shape
    around, extras = rule.surround(torch.zeros(()).expand(shape), site.name)
    magnitude = _magnitude(site.name, entry)
    if not around.keeps_weight:
        weight = entry.read()
        matrix = stored_matrix(weight.mT if site.is_transposed else weight, around, extras)
        magnitude = float(matrix.abs().amax())
    spec = hold_scales(fitted_spec(rule, shape), magnitude, site.name)
    reason = rule.method.refuses(spec)
    if reason is not None:
        raise SpecError(f'"{site.name}": {reason}')
    return StoredWeight(spec, shape, dtype, site.is_transposed, around)


def _magnitude(name: str, entry: TensorEntry) -> float:
    if not entry.dtype.is_floating_point:
        raise WeightError(f'"{name}" is {entry.dtype} in {entry.path}; only float matrices are quantized, exclude it')
    largest = 0.0
    for piece in entry.pieces():
        values = piece.view(entry.dtype)
        low, high = (values.float() if entry.dtype.itemsize == 1 else values).aminmax()
        largest = max(largest, -low.item(), high.item()) if math.isfinite(low.item() - high.item()) else math.inf
        if largest == math.inf:
            raise WeightError(
                f'"{name}" in {entry.path} holds NaN or infinite values; '
                "repair the checkpoint or leave this weight out (exclude)"
            )
    return largest


def _quantized(name: str, entry: TensorEntry, stored: StoredWeight, rule: Rule) -> Block:
    method = rule.method
    assert method is not None
    is_as_read = not stored.is_transposed and stored.surroundings.keeps_weight
    step = rows_at_once(method, stored.spec, stored.shape[-1]) if is_as_read else None

    def whole(append: Append) -> None:
        weight = rule.quantize(entry.read(), name=name, is_transposed=stored.is_transposed)
        for part, value in weight.tensors.items():
            append(f"{name}.{part}", value)

    def by_rows(append: Append) -> None:
        rows = math.prod(stored.shape[:-1])
        for start in range(0, rows, step or rows):
            weight = entry.rows(start, min(start + (step or rows), rows)).float()
            for part, value in storage.encode(method.choose(weight, stored.spec, {}), stored.spec).items():
                append(f"{name}.{part}", value)

    return Block(name, stored.layout(name), whole if step is None else by_rows, entry.nbytes)
