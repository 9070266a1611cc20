"""Outputs of calibrated runs that died when all was done but for removing the work folder.

Before the output takes its place, the work folder gets a record of it: of the request, of the output's files (name,
size and time of change, which renaming keeps), and of what there is to report. So the same command recognises what it
has made, removes the work folder and reports, instead of refusing to overwrite it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptqc.folders.artefacts import WorkFolder, work_folder_of
from ptqc.folders.conversion import Request, StreamReport
from ptqc.folders.folder import open_folder
from ptqc.folders.manifest import Manifest
from ptqc.folders.staging import refuse_target
from ptqc.sites import Skipped

__all__ = ["finished_report", "record_output", "refuse_output"]

_PLAIN = ("source_bytes", "written_bytes", "is_streamed", "pieces")


def record_output(folder: WorkFolder, request: Request, staging: Path, report: StreamReport) -> None:
    """Note in the work folder that the output in `staging` is complete."""
    plain = {name: getattr(report, name) for name in _PLAIN}
    skipped = [[entry.name, entry.reason] for entry in report.skipped]
    folder.record(
        {
            "request": _request(folder.base, request),
            "files": _files(staging),
            "report": plain | {"skipped": skipped, "notes": list(report.notes)},
        }
    )


def finished_report(folder: WorkFolder, request: Request, target: Path) -> StreamReport | None:
    """The report of the run that wrote `target`, if it was one of the same request and its work folder is left."""
    record = _record_of(folder.path, target)
    if record is None or record["request"] != _request(folder.base, request):
        return None
    found = record["report"]
    weights = Manifest.from_config(open_folder(target).config["quantization_config"], str(target)).weights
    skipped = tuple(Skipped(name, reason) for name, reason in found["skipped"])
    plain = {name: found[name] for name in _PLAIN}
    return StreamReport(weights, skipped, **plain, resumed=plain["pieces"], notes=tuple(found["notes"]))


def refuse_output(target: Path, overwrite: bool) -> None:
    """Hold a target against the rules of `staged` before work begins, unless a run has completed it and died then.

    Raises: CheckpointError if it is a file, or a folder that may not be replaced.
    """
    if _record_of(work_folder_of(target), target) is None:
        refuse_target(target, overwrite)


def _record_of(work: Path, target: Path) -> Mapping[str, Any] | None:
    """What a work folder records of `target` as it is now."""
    record = WorkFolder.recorded(work)
    return record if record is not None and target.is_dir() and record.get("files") == _files(target) else None


def _request(base: str, request: Request) -> list[Any]:
    return [base, request.max_shard_bytes, request.trust_remote_code]


def _files(folder: Path) -> dict[str, list[int]]:
    states = {file.name: file.stat() for file in folder.iterdir()}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
