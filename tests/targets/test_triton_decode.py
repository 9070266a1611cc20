"""The PTX that decodes words, run on all words there are, against the levels of the packed codes."""

import re

import numpy as np
import pytest
import torch

from ptqc.act_spec import ActSpec
from ptqc.codegen.gpu.forms import form_of
from ptqc.codegen.gpu.levels import byte_planes, whole_levels
from ptqc.codegen.gpu.ptx import HALVES
from ptqc.codegen.gpu.scaled import centred_bytes
from ptqc.codegen.gpu.words import pack_words, word_layout
from ptqc.codegen.targets.triton_eight_bit import TritonEightBit
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec
from ptqc.storage import levels
from tests.targets.ptx import run_ptx

SPECS = ["int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "ternary", "nf4", "fp4", "iq4nl", "e2m1",
         "fp8e4m3", "fp8e5m2", "int4z", "int2z", "int5z", "int8z", "int4f", "int8f"]  # fmt: skip
SCALED = ["int1g64", "int2g64", "int3g64", "int4g32", "int4g64z", "int4g128f", "int5g64", "int6g64f", "int7g64",
          "int8g128", "ternaryg64", "int4g16", "int2g16m", "int8g32"]  # fmt: skip
TABLES = ["mxfp4", "nvfp4", "iq4nlg32", "e2m1g64"]
CALL = re.compile(r'inline_asm_elementwise\(\s*"""(.*?)""",\s*"(.*?)", \[(.*?)\], dtype', re.S)
TILE = re.compile(r"\((?P<part>\w+)(?: - (?P<number>[0-9.]+))?\)\.to|(?P<bare>\w+)\.to")


def decoded(form, words, zero):
    """Run the functions of a form on words [words, n]. Returns the levels of all fields, [fields, n] float64."""
    parts = {"whole": -zero, "rest": -zero}
    if form.subtracted.has_fractions and form.half.suffix == "bf16x2":
        parts["whole"] = -np.clip(np.floor(zero + 0.5), 0, 2**form.spec.bits - 1)
        parts["rest"] = -parts["whole"] - zero
    fields = []
    planes = byte_planes(form.spec.book.levels, form.half) if form.tables else []
    for program in CALL.findall(form.functions):
        text, constraints, names = program
        if "lanemask" in text:
            continue
        registers = []
        for name in names.split(", "):
            if re.fullmatch(r"w\d", name):
                registers.append(np.concatenate([words[int(name[1])]] * 2).view(np.uint32))
            elif name.startswith("plane"):
                registers += [np.uint32(planes[int(name[5:])] & 0xFFFFFFFF)] * 2
            else:
                match = TILE.match(name)
                value = parts[match["part"] or match["bare"]] - float(match["number"] or 0)
                registers.append(np.uint32(form.half.bits(_rounded(value, form.half)) * 0x10001))
        results = run_ptx(text, constraints.count("="), registers)
        fields += [_numbers(result, form.half) for result in results]
    return np.stack(fields)


def _rounded(value, half):
    dtype = torch.float16 if half.suffix == "f16x2" else torch.bfloat16
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def _numbers(register, half):
    dtype = torch.float16 if half.suffix == "f16x2" else torch.bfloat16
    return torch.from_numpy(register.view(np.int16).copy()).view(dtype).double().numpy()


def some_codes(spec, layout):
    """Codes [blocks, block]: all that there are, in all fields."""
    codes = torch.arange(layout.block * 512) * 2654435761 >> 7
    return (codes % (3 if spec.codebook == "ternary" else 1 << spec.bits)).to(torch.uint8).view(-1, layout.block)


def words_of(codes, layout):
    """The words of codes, [words, n] int16."""
    packed = pack_words(codes.reshape(1, -1), layout, 1).view(len(codes), layout.words, layout.rows)
    return packed.transpose(0, 1).reshape(layout.words, -1).contiguous().numpy()


@pytest.mark.parametrize("name", SCALED)
def test_scaled_programs_round_once(name):
    spec = WeightSpec.parse(name)
    form = form_of(spec, 4096, torch.float16)
    assert form.is_scaled
    layout, scales = form.layout, form.scales_per_row
    codes = some_codes(spec, layout)
    words = words_of(codes, layout)
    scale = np.array([16411.0 + 1504 * i / scales for i in range(scales)]).astype(np.float16)
    zero = np.array([form.subtracted.constant] * scales, float) if spec.zero == "none" else np.arange(scales) + 5.4375
    minus = (-zero * scale * 2.0**-24).astype(np.float16)
    halves = [*scale * np.array(form.scale_steps, np.float16), *(() if spec.zero == "none" else minus)]
    fields = run_scaled(form, words, halves)
    for j, field in enumerate(fields):
        at = j // form.fields_per_scale
        code = codes.view(-1, layout.fields, layout.rows)[:, j].flatten().double().numpy()
        exact = code * 2.0**-24 * float(scale[at]) + float(minus[at])
        np.testing.assert_array_equal(field[: len(code)], exact.astype(np.float16).astype(float))


@pytest.mark.parametrize("name", TABLES)
def test_scaled_tables_round_once(name):
    spec = WeightSpec.parse(name)
    form = form_of(spec, 4096, torch.float16)
    assert form.is_scaled and form.scale_steps == (1.0,)
    layout, scales = form.layout, form.scales_per_row
    codes = some_codes(spec, layout)
    whole = whole_levels(spec.book.levels)
    scale = np.array([16411.0 + 1504 * i / scales for i in range(scales)]).astype(np.float16)
    fields = run_scaled(form, words_of(codes, layout), scale, centred_bytes(whole.levels))
    for j, field in enumerate(fields):
        code = codes.view(-1, layout.fields, layout.rows)[:, j].flatten().long()
        exact = np.array(whole.levels)[code] * 2.0**-24 * float(scale[j // form.fields_per_scale])
        np.testing.assert_array_equal(field[: len(code)], exact.astype(np.float16).astype(float))


def run_scaled(form, words, halves, planes=()):
    """Run the functions of a form that scales on words [words, n] and on scales. Returns the weights of all fields."""
    pairs = np.array([*halves, *[0] * (len(halves) % 2)], np.float16).view(np.uint32)
    fields, word = [], 0
    for text, constraints, names in CALL.findall(form.functions):
        if "lanemask" in text:
            continue
        registers = []
        for kind, index in re.findall(r"(plane|w|v)(\d+)", names):
            if kind == "w":  # functions of tables call theirs w0
                at, word = (word, word + 1) if len(planes) else (int(index), word)
                registers.append(np.concatenate([words[at]] * 2).view(np.uint32))
            else:
                value = pairs[int(index)] if kind == "v" else np.uint32(planes[int(index)] & 0xFFFFFFFF)
                registers += [value, value]
        fields += [_numbers(result, form.half) for result in run_ptx(text, constraints.count("="), registers)]
    return fields


def test_two_codes_of_a_byte():
    request = KernelRequest(WeightSpec.parse("int4"), 64, 128, torch.float16, "cuda", ActSpec.parse("int8-token"))
    ((text, constraints),) = re.findall(r'"(\{ .reg .b32 up.*?)",\s*"(.*?)"', TritonEightBit().emit(request).text)
    stored = np.arange(256, dtype=np.uint8).view(np.uint32)
    low, high = (field.view(np.int8) for field in run_ptx(text, constraints.count("="), [stored]))
    code = np.arange(256).astype(np.uint8).view(np.int8)
    np.testing.assert_array_equal(low, code << 4)
    np.testing.assert_array_equal(high, code & -16)


def test_levels_that_are_integers():
    assert whole_levels((0.5, -6.0)).levels == (1, -12)
    assert whole_levels((1.0, 127.0)).unit == 1
    assert whole_levels((1 / 3, 1.0)) is None and whole_levels((16.5, 100.0)) is None and whole_levels(()) is None


def test_blocks_of_short_groups_are_as_long_as_others():
    layout = word_layout(4, 32)
    assert (layout.rows, layout.fields, layout.words, layout.block) == (32, 8, 2, 256)
    assert [pieces[0].word for pieces in layout.pieces] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert word_layout(2, 16).block == word_layout(4, 16).block == 256
    assert word_layout(8, 32).block == 128 and word_layout(6, 16).block == 128  # more would not fit twice


def test_what_is_scaled_in_the_decoder():
    def is_scaled(name, dtype=torch.float16):
        return form_of(WeightSpec.parse(name), 4096, dtype).is_scaled

    assert not is_scaled("int4g64", torch.bfloat16)  # 8 bits are too few for a scale
    assert not is_scaled("int8g64z")  # zeros of wide codes stay exact
    assert not is_scaled("int4") and not is_scaled("nf4g64")  # levels that are no integers
    assert is_scaled("mxfp4") and not is_scaled("mxfp4", torch.bfloat16)


@pytest.mark.parametrize("dtype", list(HALVES))
@pytest.mark.parametrize("name", SPECS)
def test_programs_give_the_levels(name, dtype):
    spec = WeightSpec.parse(name)
    form = form_of(spec, 4096, dtype)
    assert not isinstance(form, str)
    codes = some_codes(spec, form.layout)
    if spec.book is not None and spec.book.float_dtype is not None:
        codes = torch.where(codes.view(spec.book.float_dtype).float().isfinite(), codes, 0)
    words = words_of(codes, form.layout)
    zero = {"none": 0.0, "int": 11.0 if spec.bits > 2 else 3.0, "float": 6.71875}[spec.zero]
    got = decoded(form, words, zero)[:, : words.shape[1]]
    stored = codes.view(spec.book.float_dtype) if spec.book and spec.book.float_dtype else codes
    exact = levels(stored, spec) - (0.0 if spec.zero == "none" else zero)
    expected = exact.view(len(codes), form.layout.fields, form.layout.rows).transpose(0, 1).flatten(1)
    np.testing.assert_array_equal(got, expected.to(dtype).double().numpy())
