"""Parsing files that lie: clear errors, never a crash, a hang, or memory beyond the file's size."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqc.codegen.export._gguf_parse import parse
from ptqc.errors import CheckpointError
from tests.export._gguf_files import written


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return written(tmp_path_factory.mktemp("sound") / "sound.gguf")


def test_a_sound_file(tmp_path):
    written(tmp_path / "s.gguf")
    found = parse(tmp_path / "s.gguf")
    assert found.metadata["a.number"] == 7 and found.metadata["a.flag"] is True
    assert found.metadata["a.words"] == ["one", "two", "three"]
    assert found.metadata["a.numbers"].tolist() == [1, 2, 3]
    assert found.tensors["second"].shape == (2, 32)
    assert found.read("second").shape == (2, 18)
    assert found.read_floats("first").tolist() == np.arange(64.0).reshape(2, 32).tolist()


def header(tensors=0, keys=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def key(name, kind, value):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(name=b"w", sizes=(32,), kind=0, offset=0):
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(sizes))
    return head + struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", kind, offset)


_NESTED = struct.pack("<IQ", 9, 1) * 5000
CASES = {
    "empty": (b"", "it is empty"),
    "other": (b"PK\3\4" * 10, "does not begin with GGUF"),
    "version": (header(version=9), "version 9 is not 2 or 3"),
    "cut": (header()[:-3], "it ends where"),
    "many keys": (header(keys=2**62), "keys do not fit"),
    "many tensors": (header(tensors=2**63), "tensors do not fit"),
    "long key": (header(keys=1) + struct.pack("<Q", 2**50) + b"x" * 20, "letters do not fit"),
    "unknown type": (header(keys=1) + key(b"k", 99, b"12345678"), "no value has type 99"),
    "long string": (header(keys=1) + key(b"k", 8, struct.pack("<Q", 2**40)), "letters do not fit"),
    "long array": (header(keys=1) + key(b"k", 9, struct.pack("<IQ", 4, 2**61)), "numbers do not fit"),
    "array of strings": (header(keys=1) + key(b"k", 9, struct.pack("<IQ", 8, 2**60)), "entries do not fit"),
    "nested arrays": (header(keys=1) + key(b"k", 9, _NESTED), "arrays within arrays"),
    "twice": (header(keys=2) + key(b"k", 0, b"1") * 2 + b"padding", "appears twice"),
    "alignment": (header(keys=1) + key(b"general.alignment", 4, struct.pack("<I", 3)), "no power of two"),
    "axes": (header(tensors=1) + tensor(sizes=(32,) * 9), "has 9 axes"),
    "no rows": (header(tensors=1) + tensor(sizes=(32, 0)) + bytes(99), "cannot store"),
    "block": (header(tensors=1) + tensor(sizes=(33,), kind=2) + bytes(99), "cannot store"),
    "kind": (header(tensors=1) + tensor(kind=77) + bytes(99), "of type 77"),
    "outside": (header(tensors=1) + tensor(offset=2**63) + bytes(256), "outside of the file"),
    "odd offset": (header(tensors=1) + tensor(offset=3) + bytes(256), "outside of the file"),
    "vast": (header(tensors=1) + tensor(sizes=(2**40,) * 4) + bytes(256), "outside of the file"),
    "same name": (header(tensors=2) + tensor() * 2 + bytes(512), "appears twice"),
    "overlap": (header(tensors=2) + tensor() + tensor(b"v") + bytes(512), "overlaps"),
}


@pytest.mark.parametrize("case", CASES)
def test_lies_are_errors_that_say_what_is_wrong(tmp_path, case):
    lie, said = CASES[case]
    (tmp_path / "lie.gguf").write_bytes(lie)
    with pytest.raises(CheckpointError, match=said):
        parse(tmp_path / "lie.gguf")


def test_no_memory_for_what_is_only_announced(tmp_path):
    tracemalloc.start()
    for lie, _ in CASES.values():
        (tmp_path / "lie.gguf").write_bytes(lie)
        with pytest.raises(CheckpointError):
            parse(tmp_path / "lie.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def survives(path, broken):
    path.write_bytes(broken)
    try:
        found = parse(path)
    except CheckpointError:
        return
    for name, at in found.tensors.items():
        assert found.read(name).nbytes == at.nbytes <= len(broken)


@given(junk=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_junk_behind_a_sound_header(tmp_path_factory, junk):
    survives(tmp_path_factory.getbasetemp() / "junk.gguf", header(tensors=1, keys=1) + junk)
