"""From a C++ text to a loaded library, by the compiler of the system.

Libraries lie beside the kernel texts, named by the hash of text, flags and compiler, and put there by rename, so
several processes may share them. Each ends with the SHA-256 of what comes before: a damaged one is made again instead
of being mapped. Texts include no headers of torch, hence one library serves every version of it. Compilers run in
threads: a kernel compiles while the rest of the graph does.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

from ptqc.codegen.build import cache_folder
from ptqc.codegen.cpp.isa import Isa
from ptqc.errors import PtqcError

__all__ = ["Library", "compile_library", "compiler", "missing_tools"]

log = logging.getLogger("ptqc")

Library = ctypes.CDLL

_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-w")
_COMPILERS = ("g++", "c++", "clang++")
_PROBE = 'extern "C" int probe() { int n = 0;\n#pragma omp parallel\nn = 1;\nreturn n; }\n'
_SUM_BYTES = hashlib.sha256().digest_size


def compiler() -> str | None:
    """Path of the C++ compiler: CXX, else the first of g++, c++ and clang++ that there is."""
    wanted = os.environ.get("CXX")
    return next((path for name in ((wanted,) if wanted else _COMPILERS) if (path := shutil.which(name))), None)


@cache
def missing_tools(path: str | None, isa: Isa) -> str | None:
    """Why nothing can be compiled for these instructions, or None; said once in the log."""
    reason = None
    if path is None:
        reason = f"no C++ compiler ({os.environ.get('CXX') or ', '.join(_COMPILERS)}); install g++ or set CXX"
    else:
        try:
            _build(path, _PROBE, isa.flags).probe()
        except (PtqcError, OSError) as error:
            reason = f"{path} makes no library for {isa.name}: {error}"
    if reason is not None:
        log.warning("C++ kernels are not available, slower ones serve instead: %s", reason)
    return reason


def compile_library(text: str, flags: Sequence[str]) -> "Future[Library]":
    """Start compiling a text, or loading it from the cache; the result of the future is the library.

    Raises: PtqcError with what the compiler said, from the future.
    """
    path = compiler()
    if path is None:
        raise PtqcError("no C++ compiler; install g++ or set CXX")
    return _workers().submit(_build, path, text, tuple(flags))


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="ptqc-compile")


def _build(compiler_path: str, text: str, flags: Sequence[str]) -> Library:
    command = [compiler_path, *_FLAGS, *flags]
    key = "\0".join((_identity(compiler_path), *command, text))
    path = cache_folder() / f"k_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not _is_whole(path):
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as folder:
            made = Path(folder) / path.name
            _compile(command, text, made)
            with made.open("ab") as file:
                file.write(hashlib.sha256(made.read_bytes()).digest())
            os.replace(made, path)
    return ctypes.CDLL(str(path))


def _compile(command: Sequence[str], text: str, made: Path) -> None:
    source = made.with_suffix(".cpp")
    source.write_text(text, encoding="utf-8")
    done = subprocess.run([*command, str(source), "-o", str(made)], capture_output=True, text=True)
    if done.returncode or not made.exists():
        raise PtqcError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")


def _is_whole(path: Path) -> bool:
    """True if the library is there and ends with the hash of itself."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_SUM_BYTES]).digest() == content[-_SUM_BYTES:]


@cache
def _identity(path: str) -> str:
    """What tells a compiler from its next version, without running it."""
    real = Path(path).resolve()
    status = real.stat()
    return f"{real} {status.st_size} {status.st_mtime_ns}"
