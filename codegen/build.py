"""From a request to a kernel that runs: ask the targets in order, cache the text, load it, make it an operator.

Texts live in one folder per user (PTQC_CACHE, else ~/.cache/ptqc/kernels), named by their hash and put there by
rename, so several processes may share it. The hash is in the operator's name, so a cached Inductor graph cannot call
another text.
"""

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ptqc import ops
from ptqc.codegen.experts import expert_runner
from ptqc.errors import PtqcError
from ptqc.held import AS_STORED, Layout, OneWay
from ptqc.requests import TARGETS, Emitter, Kernel, KernelRequest, KernelSource

__all__ = ["cache_folder", "kernel_for", "refusals_of", "target_for"]

log = logging.getLogger("ptqc")
_LIBRARY = torch.library.Library("ptqc", "FRAGMENT")


@cache
def _targets() -> list[tuple[str, Emitter]]:
    emitters = [(name, TARGETS.get(name)()) for name in TARGETS.names()]
    return sorted(emitters, key=lambda pair: pair[1].rank)


@cache
def _first(request: KernelRequest) -> tuple[tuple[str, Emitter] | None, tuple[tuple[str, str], ...]]:
    """The first target that does not refuse the request, and why those before it did."""
    refusals: list[tuple[str, str]] = []
    for name, emitter in _targets():
        reason = emitter.refuses(request)
        if reason is None:
            return (name, emitter), tuple(refusals)
        refusals.append((name, reason))
    return None, tuple(refusals)


def target_for(request: KernelRequest) -> str | None:
    """Name of the target that would serve the request, or None: what decides whether a step is fused."""
    found, _ = _first(request)
    return None if found is None else found[0]


def refusals_of(request: KernelRequest) -> tuple[tuple[str, str], ...]:
    """The targets that are asked before the one that serves the request, each with its reason to refuse."""
    return _first(request)[1]


@cache
def kernel_for(request: KernelRequest) -> Kernel:
    """The kernel of the first target that does not refuse the request.

    Raises: PtqcError with all the reasons if every target does; the reference takes whatever has no fusion but a bias.
    """
    found, refusals = _first(request)
    if found is None:
        reasons = "; ".join(f"{target}: {reason}" for target, reason in refusals)
        raise PtqcError(f"no target has a kernel for {request}: {reasons}")
    name, emitter = found
    log.info("%s: %s", request, name)
    return _load(name, emitter.emit(request), request, refusals)


def _load(target: str, source: KernelSource, request: KernelRequest, refusals: tuple[tuple[str, str], ...]) -> Kernel:
    if source.operator is not None:
        spec = str(request.spec)
        arguments = lambda x, parts, rest: (x, parts, spec, *(rest or [None]))  # noqa: E731
        return Kernel(target, ops.linear, AS_STORED, arguments, refusals)
    module = load_text(source.text)
    width, layout = request.width, getattr(module, "LAYOUT", None) or OneWay(module.prepare)
    arguments = lambda x, parts, rest: (x, parts, rest, width)  # noqa: E731
    experts = _expert_operator(module, layout, request.n) if request.is_plain and layout.stacked(1) else None
    return Kernel(target, _operator(module), layout, arguments, refusals, experts)


def load_text(text: str) -> ModuleType:
    """Import a generated module from the cache, writing it there if it is new."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / f"k_{digest}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def cache_folder() -> Path:
    """Where texts and what is made of them are kept."""
    wanted = Path(os.environ.get("PTQC_CACHE") or Path.home() / ".cache" / "ptqc" / "kernels")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        if os.access(wanted, os.W_OK):
            return wanted
    except OSError:
        log.info("%s cannot be written", wanted)
    return _temporary_folder()


@cache
def _temporary_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ptqc-kernels-"))


def _rows(value: Tensor) -> Tensor:
    """[..., features] as [rows, features]; vectors and single numbers as they are."""
    return value if value.ndim <= 2 else value.reshape(-1, value.shape[-1])


def _expert_operator(module: ModuleType, layout: Layout, n: int) -> Any:
    """Register `ptqc.codegen.experts` of a text as ptqc::<name of the text>_experts."""
    name = f"{module.__name__}_experts"
    if not hasattr(torch.ops.ptqc, name):
        _LIBRARY.define(
            f"{name}(Tensor x, Tensor[] parts, Tensor at, int experts, bool is_sorted, int width) -> Tensor"
        )

        def fake(x: Tensor, parts: Sequence[Tensor], at: Tensor, experts: int, is_sorted: bool, width: int) -> Tensor:
            return x.new_empty((x.shape[0], width))

        _LIBRARY.impl(name, expert_runner(module.run, layout, n), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ptqc::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ptqc, name).default


def _operator(module: ModuleType) -> Any:
    """Register `module.run` as ptqc::<name of the text>(x, parts, operands, width)."""
    name = module.__name__
    if not hasattr(torch.ops.ptqc, name):
        _LIBRARY.define(f"{name}(Tensor x, Tensor[] parts, Tensor[] operands, int width) -> Tensor")
        takes_any_shape = getattr(module.run, "takes_any_shape", False)

        def run(x: Tensor, parts: Sequence[Tensor], operands: Sequence[Tensor], width: int) -> Tensor:
            if takes_any_shape:  # views made inside of an operator are a third of what a small product costs
                whole: Tensor = module.run(x, parts, operands)
                return whole
            flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
            product: Tensor = module.run(flat, parts, [_rows(operand) for operand in operands])
            return product if x.ndim == 2 else product.view(*x.shape[:-1], width)

        def fake(x: Tensor, parts: Sequence[Tensor], operands: Sequence[Tensor], width: int) -> Tensor:
            return x.new_empty((*x.shape[:-1], width))

        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ptqc::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.ptqc, name).default
