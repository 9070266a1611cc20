"""Where files and folders are written before they take their place: hidden folders beside it, locked while in use.

A run that is killed leaves its folder behind; the next run with the same target finds it unlocked and removes it.
"""

import os
import re
import secrets
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders of dead runs stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["hidden", "hold", "shortage", "sweep"]

_PART = "part"


def hidden(path: Path, kind: str = _PART) -> Path:
    """A new name beside `path`. kind: what lies there; only parts are swept."""
    return path.with_name(f".{path.name}.ptqc-{kind}-{secrets.token_hex(4)}")


def hold(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives; None if it is in use, or cannot be locked here."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def sweep(path: Path) -> None:
    """Remove the parts of `path` that runs left which died."""
    pattern = re.compile(re.escape(f".{path.name}.ptqc-{_PART}-") + "[0-9a-f]{8}")
    for other in path.parent.iterdir():
        if not pattern.fullmatch(other.name) or not other.is_dir():
            continue
        lock = hold(other)
        if lock is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)


def shortage(target: Path, needed: int) -> str | None:
    """What to tell if a disk cannot hold `needed` bytes at `target`; None if it can.

    target: the place, or where it is written until then: users are told the place.
    """
    if re.fullmatch(rf"\..+\.ptqc-{_PART}-[0-9a-f]{{8}}", target.parent.name):
        target = target.parent.with_name(target.name)
    existing = next(folder for folder in target.resolve().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free >= needed:
        return None
    return (
        f"{target} would take {needed / 1e9:.3f} GB, but only {free / 1e9:.3f} GB are free in {existing}; "
        "free some space or choose another disk"
    )
