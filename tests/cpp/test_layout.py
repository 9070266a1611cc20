"""The layout of CPU kernels, backwards: every spec, every kind of CPU, with and without a gate, from any row on."""

import itertools

import pytest
import torch

from ptqc import storage
from ptqc.codegen.cpp.isa import ISAS
from ptqc.codegen.cpp.source import Plan, plan
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec
from tests.cpp._run import random_parts
from tests.targets.test_cpp import EVERY_SPEC, SPECS, shape

NOT_RESTORED = {"e8p3", "e8p4g64"}


def layout(name, n, k, isa="avx512vnni", **request):
    made = plan(KernelRequest(WeightSpec.parse(name), n, k, torch.float32, "cpu", **request), ISAS[isa])
    return made.layout if isinstance(made, Plan) else None


def parts_of(name, n, k):
    spec = WeightSpec.parse(name)
    made = random_parts(spec, n, k, torch.Generator().manual_seed(0))
    return {part: made[part] for part in storage.part_names(spec)}


def bits(part):
    return part.view(torch.uint8)


def check(name, isa, epilogue, exact):
    n, k = shape(name, n=98)
    found = layout(name, n, k, isa, epilogue=epilogue, exact=exact)
    if found is None:
        return
    parts = parts_of(name, n, k)
    prepared = found.prepare(list(parts.values()))
    assert ("codes" in found.restorable) == (name not in NOT_RESTORED)
    for first, rows in ((0, n), (37, 50)):
        if "codes" in found.restorable:
            restored = found.restore("codes", prepared, first, rows)
            assert torch.equal(bits(restored), bits(parts["codes"][first : first + rows])), (name, isa, first)
            assert all(restored.data_ptr() != part.data_ptr() for part in prepared)
        if "scale" in found.restorable:
            restored = found.restore("scale", prepared, first, rows)
            torch.testing.assert_close(
                restored.float(), parts["scale"][first : first + rows].float(), rtol=2e-3, atol=1e-4
            )


@pytest.mark.parametrize("name", SPECS)
def test_what_was_taken_comes_back(name):
    check(name, "avx512vnni", (), False)
    check(name, "avx512vnni", ("gate_silu",), True)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_SPEC)
def test_what_was_taken_comes_back_everywhere(name):
    for isa, epilogue, exact in itertools.product(ISAS, ((), ("gate_silu",)), (False, True)):
        check(name, isa, epilogue, exact)


def test_scales_of_float16_come_back_with_all_their_bits():
    found, parts = layout("int4g32", 64, 256), parts_of("int4g32", 64, 256)
    assert torch.equal(found.restore("scale", found.prepare(list(parts.values())), 0, 64), parts["scale"])


@pytest.mark.parametrize("name", ["int4g32", "int8", "nf4g64", "int4g24z", "e8p"])
def test_a_piece_is_a_view(name):
    k = shape(name)[1]
    whole, piece = layout(name, 192, k), layout(name, 64, k)
    parts = parts_of(name, 192, k)
    prepared = whole.prepare(list(parts.values()))
    below = {part: value[128:] for part, value in parts.items()}
    views = whole.cut(prepared, 128, piece)
    for view, alone in zip(views, piece.prepare(list(below.values())), strict=True):
        assert torch.equal(view, alone) and view.is_contiguous()
    assert views[0].untyped_storage().data_ptr() == prepared[0].untyped_storage().data_ptr()


def test_pieces_that_are_no_view():
    whole = layout("int4g32", 192, 64)
    prepared = whole.prepare(list(parts_of("int4g32", 192, 64).values()))
    assert whole.cut(prepared, 8, layout("int4g32", 64, 64)) is None  # begins within a block
    assert whole.cut(prepared, 128, layout("int4g32", 80, 64)) is None  # its padding lies outside
    assert whole.cut(prepared, 0, layout("int4g32", 64, 64, exact=True)) is None
    gated = layout("int4g32", 192, 64, epilogue=("gate_silu",))
    assert gated.cut(prepared, 0, layout("int4g32", 64, 64)) is None


def test_every_code_of_e8p_comes_back():
    codes = storage.Codes(torch.arange(1 << 16).view(64, 1024), torch.ones(64, 1))
    parts = storage.encode(codes, WeightSpec.parse("e8p"))
    found = layout("e8p", 64, 8192)
    assert torch.equal(found.restore("codes", found.prepare(list(parts.values())), 0, 64), parts["codes"])
