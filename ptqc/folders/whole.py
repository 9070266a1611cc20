"""Quantizing a model folder with the model loaded whole, where it cannot be taken apart."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ptqc.assign import assign, nothing_to_do, quantize_site
from ptqc.engine.report import Report
from ptqc.engine.run import quantize_calibrated
from ptqc.errors import PtqcError
from ptqc.folders.checkpoint import load, save
from ptqc.folders.conversion import SHARE_OF_CODES, OnProgress, Request, StreamReport
from ptqc.folders.folder import ModelFolder
from ptqc.folders.manifest import manifest_of
from ptqc.recipe import Rule, recipe_rows, remember
from ptqc.sites import Site, Skipped, find_sites, select_sites

__all__ = ["quantize_whole"]


def quantize_whole(
    stored: ModelFolder, target: Path, request: Request, batches: Sequence[Mapping[str, Tensor]] = ()
) -> StreamReport:
    """Load a model, quantize it and save it. batches: calibration data, none for rules that need none."""
    model = load(stored.path, trust_remote_code=request.trust_remote_code).eval()
    found = find_sites(model, batches[0] if batches else None)
    sites, skipped = select_sites(*found, model, request.include, request.exclude)
    work, left = assign(sites, request.recipe, has_data=bool(batches))
    if not work:
        raise PtqcError(nothing_to_do([*skipped, *left]))
    total = sum(entry.nbytes for entry in stored.entries.values())
    report = _quantize(model, work, batches, request.on_progress, total)
    remember(model, recipe_rows(request.recipe))
    save(model, target, max_shard_bytes=request.max_shard_bytes, overwrite=request.overwrite)
    request.on_progress(total, total, "written")
    weights = manifest_of(model.state_dict()).weights
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    kept = [Skipped(name, reason) for name, reason in report.skipped.items()]
    return StreamReport(
        weights, (*skipped, *left, *kept), total, written, is_streamed=False, notes=tuple(report.notes)
    )  # fmt: skip


def _quantize(
    model: nn.Module,
    work: Sequence[tuple[Site, Rule]],
    batches: Sequence[Mapping[str, Tensor]],
    on_progress: OnProgress,
    total: int,
) -> Report:
    if batches:
        return quantize_calibrated(model, work, batches, on_progress=_in_bytes(on_progress, total))[1]
    done = total - sum(site.weight.nbytes for site, _ in work)
    for site, rule in work:
        done += site.weight.nbytes
        site.replace(quantize_site(site, rule))
        on_progress(done, total, site.name)
    return Report()


def _in_bytes(on_progress: OnProgress, total: int) -> Callable[[str, float, float], None]:
    """Progress of the engine, in bytes of the source. Its phases count anew; here they never go back."""
    furthest = 0

    def on_step(what: str, done: float, whole: float) -> None:
        nonlocal furthest
        furthest = max(furthest, int(SHARE_OF_CODES * total * done / whole) if whole else 0)
        on_progress(furthest, total, what)

    return on_step
