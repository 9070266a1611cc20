"""Rows of stored weights, chosen and put together, stand for the numbers that they stood for."""

import pytest
import torch

from ptqc.errors import SpecError
from ptqc.spec import WeightSpec
from ptqc.storage import decode, encode, part_layout
from ptqc.stored_rows import concat, concat_spec, take
from tests.test_storage import NAMES, random_codes


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
