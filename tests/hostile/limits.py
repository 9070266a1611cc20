"""What reading a hostile file may cost, and how it may end: a value, or one of our errors in one line."""

import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ptqc.errors import PtqcError

SECONDS = 5.0
"""Of the processor: what else a machine does is no fault of the reader."""
NBYTES = 512 << 20
"""More address space than the process has: files are of some kilobytes."""
_OUT_OF_MEMORY = ("allocate memory", "MemoryError", "not enough memory", "Unable to allocate", "bad_alloc")


class TooSlowError(BaseException):
    """No Exception: nothing that catches hostile errors of other libraries may catch it."""


@contextmanager
def bounded(seconds: float = SECONDS, nbytes: int = NBYTES) -> Iterator[None]:
    """Raise where a block takes longer, or asks for more memory, whether it is touched or not."""

    def late(*_: object) -> None:
        raise TooSlowError(f"longer than {seconds:g} s")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (held + nbytes, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, handler)


def fault_of(read: Callable[[], object]) -> str | None:
    """None if a reader returns, or refuses as it should; else what it did."""
    try:
        with bounded():
            read()
    except PtqcError as error:
        return _fault_of_refusal(error)
    except (Exception, TooSlowError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/ptqc/" in frame.filename] or frames
        return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {error}"[:300]
    return None


def _fault_of_refusal(error: PtqcError) -> str | None:
    said = str(error)
    if any(word in f"{said} {error.__cause__!r}" for word in _OUT_OF_MEMORY):
        return f"it asked for too much memory before it refused: {said}"[:300]
    if len(said) < 15 or "\n" in said or len(said) > 1100:
        return f"no clear message in one line: {said!r}"[:300]
    return None
