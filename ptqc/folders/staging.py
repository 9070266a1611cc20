"""Output folders that appear whole or not at all: written beside their place under another name, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ptqc.errors import CheckpointError, PtqcError
from ptqc.scratch import hidden, hold, shortage, sweep

__all__ = ["refuse_target", "require_space", "staged", "unwritable"]


def require_space(target: Path, needed: int) -> None:
    """Refuse to begin a checkpoint of `needed` bytes on a disk that cannot hold it.

    Raises: CheckpointError that says how much is missing.
    """
    reason = shortage(target, needed)
    if reason is not None:
        raise CheckpointError(reason)


@contextmanager
def staged(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the body ends, and vanishes when it fails.

    Folders that dead runs left are removed. overwrite: a model folder may be replaced; nothing else ever is.

    Raises: CheckpointError if the target may not be replaced, or cannot be written.
    """
    path = Path(target).resolve()
    try:
        refuse_target(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        staging = hidden(path)
        staging.mkdir()
    except OSError as error:
        raise unwritable(path, error) from None
    lock = hold(staging)
    try:
        yield staging
        _put_in_place(staging, path)
    except PtqcError:
        raise
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


_ADVICE = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "choose a disk that holds larger files",
}


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """What to tell when a path could not be written."""
    if isinstance(error, CheckpointError):
        return error
    advice = _ADVICE.get(error.errno or 0, "choose a folder you may write to")
    return CheckpointError(f"cannot write {path}: {error.strerror or error}; {advice}")


def refuse_target(path: Path, overwrite: bool) -> None:
    """Hold a target against the rules of `staged` before work begins.

    Raises: CheckpointError if it is a file, or a folder that may not be replaced.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; give the name of a folder to write")
    names = sorted(file.name for file in path.iterdir())
    if not names:
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists and is not empty; choose another folder, or ask for overwrite")
    is_model = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    folders = [file.name for file in path.iterdir() if file.is_dir()]
    if not is_model or folders:
        found = f"the folder {folders[0]}" if folders else f"{len(names)} files, no model"
        raise CheckpointError(f"{path} holds {found}; only a plain model folder is overwritten, choose another")


def _put_in_place(staging: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.replace(staging, path)
        return
    before = hidden(path, "old")  # another kind: a run that dies right here must not lose it to the next one's sweep
    os.replace(path, before)
    try:
        os.replace(staging, path)
    except OSError:
        with suppress(OSError):
            os.replace(before, path)
        raise
    shutil.rmtree(before, ignore_errors=True)
