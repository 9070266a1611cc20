"""Parts: logical form to stored form and back, for every kind of spec."""

from dataclasses import replace

import pytest
import torch

from ptqc.spec import KNOWN_SPECS, WeightSpec
from ptqc.storage import (
    Codes,
    combine,
    decode,
    decode_scales,
    encode,
    levels,
    part_layout,
    part_names,
    round_scale,
)

NAMES = ["int1g8", "int2g32f", "int3g64z", "int4g64", "int4g32m", "int5g8", "int6", "int8t", "int8g32-f32", "nf4g64",
         "nf4g64dq", "fp4g32", "ternaryg64", "fp8e4m3", "fp8e4m3b128x128", "fp8e5m2t", "e2m1g16-e4m3",
         "e8p", "e8pt", "e8p3g64", "e8p4",
         *sorted(KNOWN_SPECS)]  # fmt: skip


def random_codes(spec, shape, generator):
    """Codes, scales and zeros that `spec` can hold exactly."""
    lead = shape[:-2]
    rows, columns = spec.groups(shape)
    scale = torch.rand((*lead, rows, columns), generator=generator) + 0.1
    zero = None
    if spec.zero == "int":
        zero = torch.randint(0, 2**spec.bits, scale.shape, generator=generator).float()
    elif spec.zero != "none":
        zero = round_scale(torch.rand(scale.shape, generator=generator), spec, zero_minimum=True)
    if spec.book and spec.book.float_dtype:
        codes = torch.randn(shape, generator=generator).to(spec.book.float_dtype)
    else:
        count = len(spec.book.levels) if spec.book and spec.book.levels else 2**spec.bits
        codes = torch.randint(0, count, shape, generator=generator)
        codes = codes.to(torch.uint8) if spec.bits <= 8 else codes[..., :: spec.vector].contiguous()
    return Codes(codes, round_scale(scale, spec), zero)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_round_trip(name, lead, seeded):
    spec = WeightSpec.parse(name)
    shape = (*lead, 192, 512)
    logical = random_codes(spec, shape, seeded)
    parts = encode(logical, spec)
    assert list(part_layout(spec, shape)) == part_names(spec)
    assert {n: (tuple(p.shape), p.dtype) for n, p in parts.items()} == part_layout(spec, shape)
    scale, zero = decode_scales(parts, spec, shape)
    if not spec.scale.dynamic:  # decoding subtracts and adds a mean: equal up to rounding only
        assert torch.equal(scale, logical.scale)
    assert zero is None if logical.zero is None else torch.allclose(zero, logical.zero)
    expected = combine(levels(logical.codes, spec), scale, zero, spec)
    assert torch.equal(decode(parts, spec, shape, torch.float32), expected)


def test_the_equation_by_hand():
    spec = WeightSpec.parse("int4g2z")
    codes = torch.tensor([[0, 15, 3, 4]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[8.0, 4.0]])
    parts = encode(Codes(codes, scale, zero), spec)
    assert decode(parts, spec, (1, 4), torch.float32).tolist() == [[-4.0, 3.5, -2.0, 0.0]]
    minimum = replace(spec, zero="min")
    parts = encode(Codes(codes, scale, zero), minimum)
    assert decode(parts, minimum, (1, 4), torch.float32).tolist() == [[-8.0, -0.5, 2.0, 4.0]]
