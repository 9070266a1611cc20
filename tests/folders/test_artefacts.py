import errno
import os

import pytest
import torch

from ptqc.errors import CheckpointError
from ptqc.folders.artefacts import WorkFolder, work_folder_of
from ptqc.folders.shards import TensorWriter
from ptqc.methods import quantize_weight
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec

SPEC = WeightSpec.parse("int4g32z")
SAID = {"said": {"it is short": ["up.weight"]}, "skipped": {}}


@pytest.fixture
def state(seeded):
    weight = quantize_weight(torch.randn(16, 64, generator=seeded).half(), RoundToNearest(), SPEC)
    return {"up.weight": weight, "norm.weight": torch.randn(64, generator=seeded).half()}


def test_a_piece_comes_back_as_it_was(tmp_path, state):
    with WorkFolder(tmp_path / "work", "base") as folder:
        key = folder.key(3, "", ["graph"])
        assert folder.read(3, key) is None
        written = folder.write(3, key, state, SAID)
        found = folder.read(3, key)
    assert found.digest == written.digest and found.said == SAID
    assert list(found.manifest.weights) == ["up.weight"]
    back = found.state()
    assert isinstance(back["up.weight"], QuantTensor) and back["up.weight"].dtype == torch.float16
    assert torch.equal(back["up.weight"].dequantize(), state["up.weight"].dequantize())
    assert torch.equal(back["norm.weight"], state["norm.weight"])
    assert os.listdir(tmp_path / "work") == ["piece-00003.safetensors"]


def test_keys_differ_with_everything_that_a_piece_is_made_from(tmp_path):
    one = WorkFolder(tmp_path, "base")
    keys = {one.key(0, "", ["ab", "c"]), one.key(1, "", ["ab", "c"]), one.key(0, "x", ["ab", "c"])}
    keys |= {one.key(0, "", ["a", "bc"]), WorkFolder(tmp_path, "other").key(0, "", ["ab", "c"])}
    assert len(keys) == 5


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "spoil", [flip, lambda data: data[:-1], lambda data: b"", lambda data: b"PK\x03\x04" + data], ids=range(4)
)
def test_a_broken_file_is_as_if_it_were_not_there(tmp_path, state, spoil):
    with WorkFolder(tmp_path / "work", "base") as folder:
        key = folder.key(0, "", [])
        folder.write(0, key, state, SAID)
        (file,) = (tmp_path / "work").iterdir()
        file.write_bytes(spoil(file.read_bytes()))
        assert folder.read(0, key) is None
        folder.write(0, key, state, SAID)
        assert folder.read(0, key) is not None
        assert folder.read(0, folder.key(0, "", ["another"])) is None


def test_what_dead_runs_left_is_swept_and_pieces_stay(tmp_path, state):
    with WorkFolder(tmp_path / "work", "base") as folder:
        folder.write(0, "key", state, SAID)
    (tmp_path / "work" / "piece-00001.tmp").write_bytes(b"half")
    (tmp_path / "work" / "ptqc-activations-x").mkdir()
    with WorkFolder(tmp_path / "work", "base") as folder:
        assert os.listdir(tmp_path / "work") == ["piece-00000.safetensors"]
        folder.remove()
    assert not (tmp_path / "work").exists()


def test_the_record_of_a_complete_output(tmp_path, state):
    with WorkFolder(tmp_path / "work", "base") as folder:
        assert WorkFolder.recorded(folder.path) is None
        folder.record({"files": {"a": [1, 2]}})
        assert WorkFolder.recorded(folder.path) == {"files": {"a": [1, 2]}}
        folder.write(0, "key", state, SAID)
        (folder.path / "finished.json").write_text("[1]")
        assert WorkFolder.recorded(folder.path) is None
        folder.remove()
    assert WorkFolder.recorded(folder.path) is None and os.listdir(tmp_path) == []


def test_two_runs_do_not_share_a_folder(tmp_path):
    path = work_folder_of(tmp_path / "out")
    assert path == tmp_path / ".out.ptqc-work"
    with (
        WorkFolder(path, "base"),
        pytest.raises(CheckpointError, match="in use by another run"),
        WorkFolder(path, "base"),
    ):
        pass
    with WorkFolder(path, "base"):
        pass


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_file(tmp_path, state, monkeypatch):
    def fail(self, position, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with WorkFolder(tmp_path / "work", "base") as folder:
        folder.write(0, "key", state, SAID)
        monkeypatch.setattr(TensorWriter, "_write", fail)
        with pytest.raises(CheckpointError, match=r"No space left on device; free some space .*run the same again"):
            folder.write(1, "key", state, SAID)
        assert os.listdir(tmp_path / "work") == ["piece-00000.safetensors"]
