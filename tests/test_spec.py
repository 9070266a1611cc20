"""WeightSpec: names that parse back, bits per weight, bytes, fitting."""

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.spec import KNOWN_SPECS, ScaleSpec, WeightSpec
from ptqc.storage import part_layout

GROUPS = st.sampled_from([None, 8, 16, 32, 48, 64, 128])


def specs():
    """Specs that a name can spell."""
    integers = st.builds(
        WeightSpec,
        bits=st.integers(1, 8),
        group=GROUPS,
        zero=st.sampled_from(["none", "int", "float", "min"]),
        scale=st.sampled_from([ScaleSpec(), ScaleSpec(dtype="bf16"), ScaleSpec(dtype="f32")]),
    )
    names = st.sampled_from(["nf4", "fp4", "e2m1", "ternary", "fp8e4m3", "iq4nl", "e8p", "e8p3"])
    books = st.builds(lambda name, group: WeightSpec.parse(name if group is None else f"{name}g{group}"), names, GROUPS)
    return st.one_of(integers, books, st.sampled_from(list(KNOWN_SPECS.values())))


@given(specs())
def test_name_parses_back(spec):
    assert WeightSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int4g64", 4.25), ("int4g64z", 4.3125), ("int4g64f", 4.5), ("int8", 8), ("nf4g64", 4.5), ("ternaryg64", 1.85),
     ("nf4g64dq", 4 + (8 + 32 / 256) / 64), ("fp8e4m3b128x128", 8 + 32 / 128**2), ("int3g128z-bf16", 3 + 19 / 128),
     ("e8p", 2), ("e8p3", 3), ("e8p4t", 4), ("e8pg64", 2.25)],
)  # fmt: skip
def test_bits_per_weight(name, bits):
    assert WeightSpec.parse(name).bits_per_weight == pytest.approx(bits, abs=0)


@pytest.mark.parametrize("name", sorted(KNOWN_SPECS))
def test_known_formats_take_what_gguf_says(name):
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
    assert KNOWN_SPECS[name].bits_per_weight == size * 8 / block


@given(specs(), st.integers(1, 4), st.sampled_from([384, 768]))
def test_nbytes_is_the_sum_of_the_parts(spec, rows, columns):
    shape = (rows * 16, columns)
    if spec.group is not None and columns % spec.group:
        return
    layout = part_layout(spec, shape)
    total = 0
    for part_shape, dtype in layout.values():
        count = 1
        for size in part_shape:
            count *= size
        total += count * dtype.itemsize
    assert spec.nbytes(shape) == total


@pytest.mark.parametrize(
    ("group", "columns", "expected"), [(64, 128, 64), (64, 100, 50), (64, 64, None), (64, 40, None), (64, 257, None)]
)
def test_fit_finds_the_nearest_divisor(group, columns, expected):
    assert WeightSpec.integer(4, group).fit((8, columns)).group == expected


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int4g64q", "int4g64"),
        ("int9", "1 to 8 bits"),
        ("nf5", "nf4"),
        ("", "codes"),
        ("int4g0", "positive"),
        ("e8pz", "symmetric"),
        ("e8pg12", "group 12 cuts them"),
    ],
)
def test_errors_say_what_would_work(name, says):
    with pytest.raises(SpecError, match=says):
        WeightSpec.parse(name)


def test_a_group_that_does_not_divide_names_those_that_do():
    with pytest.raises(SpecError, match=r"group 128 does not divide in_features 4000; use 80 or 160 or 200"):
        WeightSpec.integer(4, 128).groups((8, 4000))


def test_vectors_of_a_lattice_divide_the_row():
    assert WeightSpec.parse("e8pg64").fit((8, 400)).group == 40  # 50 would cut a vector
    spec = WeightSpec.parse("e8pg64").fit((8, 100))
    assert spec.group is None
    with pytest.raises(SpecError, match="8 weights, which do not divide in_features 100; leave"):
        spec.groups((8, 100))
    with pytest.raises(SpecError, match="codes of nf4 stand for 1 weights, not 8"):
        WeightSpec(bits=4, codebook="nf4", vector=8)


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_impossible_widths(bits):
    with pytest.raises(SpecError):
        WeightSpec.integer(bits, 64)


@given(
    st.sampled_from(["int8", "fp8e4m3"]),
    st.sampled_from([("token", False), ("tensor", False), ("tensor", True)]),
    st.none() | st.floats(1e-30, 1e30),
)
def test_names_of_activation_specs_parse_back(dtype, scale, outlier):
    act = ActSpec(dtype=dtype, scale=scale[0], is_static=scale[1], outlier=outlier)
    assert ActSpec.parse(str(act)) == act


def test_activation_specs_have_short_names():
    names = ["float", "int8-token", "int8-tensor-static", "fp8e4m3-token", "int8-token-outlier6"]
    assert [str(ActSpec.parse(name)) for name in names] == names
    assert ActSpec.parse("int8-token-outlier6").outlier == 6


@pytest.mark.parametrize("name", ["", "int8", "int4-token", "int8-token-", "int8-token-outlier", "int8-token-outlier1e",
                                  "int8-token-outlier0", "int8-token-static", "int8-token-outlier1e999"])  # fmt: skip
def test_other_activation_specs_are_refused(name):
    with pytest.raises(SpecError):
        ActSpec.parse(name)


def test_an_activation_spec_says_nothing_that_means_nothing():
    for nonsense in ({"outlier": 6.0}, {"scale": "tensor"}, {"dtype": "int8", "is_static": True}):
        with pytest.raises(SpecError):
            ActSpec(**nonsense)
