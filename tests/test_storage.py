"""Parts: logical form to stored form and back, for every kind of spec."""

from dataclasses import replace

import pytest
import torch

from ptqc.errors import SpecError
from ptqc.spec import KNOWN_SPECS, WeightSpec
from ptqc.storage import (
    Codes,
    combine,
    concat,
    concat_spec,
    decode,
    decode_scales,
    encode,
    levels,
    part_layout,
    part_names,
    round_scale,
    take,
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


@pytest.mark.parametrize("name", ["int4g64f", "nf4g64dq", "q4_K", "q3_K", "int8", "e8p"])
@pytest.mark.parametrize("index", [1, slice(1, 3), torch.tensor([2, 0, 2])])
def test_taking_a_slice_equals_slicing_the_numbers(name, index, seeded):
    spec, shape = WeightSpec.parse(name), (4, 16, 256)
    parts = encode(random_codes(spec, shape, seeded), spec)
    whole = decode(parts, spec, shape, torch.float32)
    taken_parts, taken_spec = take(parts, spec, shape, 0, index)
    taken_shape = (*taken_parts["codes"].shape[:-1], shape[-1])
    assert torch.equal(decode(taken_parts, taken_spec, taken_shape, torch.float32), whole[index])


def test_taking_along_the_input_is_refused(seeded):
    spec, shape = WeightSpec.parse("int4g64"), (16, 128)
    assert take(encode(random_codes(spec, shape, seeded), spec), spec, shape, 1, slice(0, 64)) is None


@pytest.mark.parametrize("name", NAMES)
def test_weights_one_below_the_other_hold_the_same_numbers(name, seeded):
    spec = WeightSpec.parse(name)
    shapes = [(128, 256), (256, 256), (96, 256)]
    weights = [encode(random_codes(spec, shape, seeded), spec) for shape in shapes]
    made = concat_spec(spec, [out for out, _ in shapes], 256)
    if isinstance(made, str):
        assert spec.rows is None
        with pytest.raises(SpecError, match="one scale for the whole weight: these weights"):
            concat(weights, spec, 256)
        return
    together = concat(weights, spec, 256)
    numbers = decode(together, made, (480, 256), torch.float32)
    apart = [decode(parts, spec, shape, torch.float32) for parts, shape in zip(weights, shapes, strict=True)]
    assert torch.equal(numbers, torch.cat(apart))
    assert {key: (tuple(part.shape), part.dtype) for key, part in together.items()} == part_layout(made, (480, 256))
    assert all(part is weights[0][key] for key, part in concat(weights[:1], spec, 256).items())


@pytest.mark.parametrize(
    ("name", "outs", "made"),
    [("int8t", [64, 64], "int8t has one scale for the whole weight"), ("int8t", [64], "int8t"),
     ("fp8e4m3b128x128", [64, 64], "fp8e4m3b128x128 has a scale per 128 rows, which does not divide 64"),
     ("fp8e4m3b128x128", [256, 64], "fp8e4m3b128x128"), ("nf4g64dq", [64, 64], "nf4g64"),
     ("q4_K", [3, 3], "q4_K")],
)  # fmt: skip
def test_how_weights_are_stored_as_one(name, outs, made):
    assert str(concat_spec(WeightSpec.parse(name), outs, 256)) == made
