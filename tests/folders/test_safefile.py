import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ptqc.errors import CheckpointError
from ptqc.folders.safefile import DTYPES, parse_header, read_safefile
from ptqc.folders.shards import TensorWriter

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [4], "data_offsets": [24, 28]},
}


def write(path: Path, header: object, data: bytes = bytes(28), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def changed(name: str, **fields: object) -> dict:
    return GOOD | {name: GOOD[name] | fields}


def sample(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype == torch.bool else 100
    raw = torch.randint(0, high, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.bool() if dtype == torch.bool else raw.view(dtype)


def test_every_dtype_agrees_with_the_safetensors_package(tmp_path):
    tensors = {name: sample(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    read = {name: entry.read() for name, entry in read_safefile(tmp_path / "theirs.safetensors").entries.items()}
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path / "ours.safetensors", layout) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)
    loaded = load_file(tmp_path / "ours.safetensors")
    assert read.keys() == loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for other in (read[name], loaded[name]):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_rows_and_pieces_are_the_tensor(tmp_path):
    tensor = torch.arange(60, dtype=torch.bfloat16).view(2, 5, 6)
    save_file({"x": tensor, "before": torch.zeros(3)}, tmp_path / "x.safetensors")
    entry = read_safefile(tmp_path / "x.safetensors").entries["x"]
    assert torch.equal(entry.rows(3, 7), tensor.view(10, 6)[3:7])
    assert torch.equal(torch.cat(list(entry.pieces(size=7))).view(torch.bfloat16), tensor.flatten())


@pytest.mark.parametrize(
    ("header", "data", "length", "complaint"),
    [
        (b"", b"", None, "no valid JSON"),
        (GOOD, bytes(28), 0, "no valid JSON"),
        (GOOD, bytes(28), 2**63, "announces a header of"),
        (GOOD, bytes(28), 99_999, "announces a header of"),
        (b"\xff\xfe{}", bytes(28), None, "no valid JSON"),
        (b"{", bytes(28), None, "no valid JSON"),
        (b"[" * 100_000, bytes(28), None, "no valid JSON"),
        (b'{"a": NaN}', bytes(28), None, "NaN is no number"),
        (b'{"a": 1, "a": 1}', bytes(28), None, "a name occurs twice"),
        (b"[]", bytes(28), None, "no JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", bytes(28), None, "no valid JSON"),
        (GOOD | {"__metadata__": {"k": 1}}, bytes(28), None, "__metadata__"),
        (GOOD | {"a": [1]}, bytes(28), None, "not described by"),
        (changed("a", extra=1), bytes(28), None, "not described by"),
        (changed("a", dtype="F31"), bytes(28), None, "unknown dtype 'F31'"),
        (changed("a", dtype=["F32"]), bytes(28), None, "unknown dtype"),
        (changed("a", shape=[2, -3]), bytes(28), None, "no valid shape"),
        (changed("a", shape=[2, True]), bytes(28), None, "no valid shape"),
        (changed("a", shape=[2**40, 2**40, 0]), bytes(28), None, "no valid shape"),
        (changed("a", shape=6), bytes(28), None, "no valid shape"),
        (changed("a", shape=[2, 4]), bytes(28), None, "takes 32 bytes, not 24"),
        (changed("a", dtype="F16"), bytes(28), None, "takes 12 bytes, not 24"),
        (changed("a", data_offsets=[24, 0]), bytes(28), None, "no valid data_offsets"),
        (changed("a", data_offsets=[0, 24, 28]), bytes(28), None, "no valid data_offsets"),
        (changed("a", data_offsets=[0, 24.0]), bytes(28), None, "no valid data_offsets"),
        (changed("a", data_offsets=[2**64, 2**64 + 24]), bytes(28), None, "no valid data_offsets"),
        (changed("b", data_offsets=[20, 24]), bytes(28), None, "overlaps"),
        (changed("b", data_offsets=[25, 29]), bytes(29), None, "leaves a hole"),
        (GOOD, bytes(27), None, "1 bytes short"),
        (GOOD, bytes(30), None, "2 bytes follow"),
    ],
)
def test_hostile_headers_are_refused_in_one_line_that_names_the_file(tmp_path, header, data, length, complaint):
    path = write(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_safefile(path)
    text = str(caught.value)
    assert complaint in text
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00" + bytes(100), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"", "truncated"),
        (b"\x00\x00\x00", "truncated"),
    ],
)
def test_other_kinds_of_files_are_recognised(tmp_path, content, what):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=what):
        read_safefile(tmp_path / "model.safetensors")


def test_missing_files_and_folders_are_errors_that_name_them(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_safefile(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="directory"):
        read_safefile(tmp_path)


def test_a_file_cut_after_its_header_was_read_is_an_error(tmp_path):
    save_file({"x": torch.zeros(100)}, tmp_path / "x.safetensors")
    entry = read_safefile(tmp_path / "x.safetensors").entries["x"]
    with open(tmp_path / "x.safetensors", "r+b") as file:
        file.truncate(300)
    with pytest.raises(CheckpointError, match="too short"):
        entry.read()


def test_bools_are_zero_or_one_whatever_the_file_says(tmp_path):
    field = {"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}
    entry = read_safefile(write(tmp_path / "b.safetensors", field, b"\x00\x07\xff")).entries["x"]
    assert entry.read().view(torch.uint8).tolist() == [0, 1, 1]


json_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
tensor_field = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", ""]) | json_value,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_value,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_value,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.binary(max_size=64)
    | json_value.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.text(max_size=4), tensor_field, max_size=3).map(lambda value: json.dumps(value).encode()),
    extra=st.integers(-8, 200),
)
def test_any_header_is_either_refused_or_describes_the_file_exactly(header, extra):
    size = 8 + len(header) + extra
    try:
        parsed = parse_header(Path("fuzz.safetensors"), header, size)
    except CheckpointError:
        return
    position = 8 + len(header)
    for entry in parsed.entries.values():
        assert entry.start == position
        assert entry.nbytes == math.prod(entry.shape) * entry.dtype.itemsize
        position += entry.nbytes
    assert position == size


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_in_a_good_file_never_escapes_the_reader(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    path = write(folder / "x.safetensors", GOOD)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = {name: entry.read() for name, entry in read_safefile(path).entries.items()}
    except CheckpointError:
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 28
