"""A target for tests that serves every request with every fusion, by dequantizing and by their references."""

from contextlib import contextmanager

import pytest

from ptqc.codegen import build
from ptqc.requests import TARGETS, KernelSource

_TEXT = '''"""Generated for tests: {request}."""

import torch

from ptqc import ops
from ptqc.fusions import apply_fusions, takes_operand

PROLOGUE, EPILOGUE, ACT = {prologue!r}, {epilogue!r}, {act!r}


def prepare(parts):
    return [part.clone() for part in parts]


def run(x, parts, operands):
    rest, dtype = list(operands), x.dtype
    before = [rest.pop(0) for name in PROLOGUE if takes_operand(name)]
    x = apply_fusions(PROLOGUE, x.float(), before)
    if ACT != "float":
        x = ops.fake_quantize(x, ACT, rest.pop(0) if {is_static} else None)
    y = ops.linear(x, list(parts), "{spec}", None)
    return apply_fusions(EPILOGUE, y, rest).to(dtype)
'''


class Everything:
    """refused: names of fusions, and of activations, that it does not take."""

    rank = 1

    def __init__(self, refused=()):
        self.refused = refused

    def refuses(self, request):
        asked = [name.partition(":")[0] for name in (*request.prologue, *request.epilogue)] + [str(request.act)]
        found = [name for name in asked if name in self.refused]
        if request.needs_grad:
            return "no derivatives"
        return f"no {found[0]}" if found else None

    def emit(self, request):
        act, is_static = str(request.act), request.act.is_static
        fields = {"prologue": request.prologue, "epilogue": request.epilogue, "act": act, "is_static": is_static}
        return KernelSource(_TEXT.format(request=request, spec=request.spec, **fields))


@contextmanager
def targets(**known):
    """Let `codegen.build` know these targets and the reference only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_targets", lambda: [*known.items(), ("reference", TARGETS.get("reference")())])
        _forget()
        yield
    _forget()


def _forget():
    for cached in (build._first, build.kernel_for):
        cached.cache_clear()


@pytest.fixture
def reference():
    """Only the reference target."""
    with targets():
        yield


@pytest.fixture
def everything():
    """Only the target above and the reference; yields it."""
    with targets(everything=(target := Everything())):
        yield target
