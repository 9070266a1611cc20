"""imatrix files of both formats: written, read, damaged."""

import struct

import gguf
import numpy as np
import pytest
import torch

from ptqc.codegen.export._gguf_architectures import architecture_of
from ptqc.codegen.export._gguf_imatrix import importance_by_tensor, read_imatrix, write_imatrix
from ptqc.codegen.export._gguf_placement import placements
from ptqc.errors import CheckpointError, ExportError
from tests.export._models import small_model

VALUES = {"blk.0.attn_q.weight": np.arange(1, 65, dtype=np.float32), "output.weight": np.full(64, 0.25, np.float32)}


@pytest.mark.parametrize("suffix", ["dat", "gguf"])
def test_a_file_comes_back(tmp_path, suffix):
    path = tmp_path / f"imatrix.{suffix}"
    write_imatrix(path, VALUES, rows=7)
    found = read_imatrix(path)
    assert found.keys() == VALUES.keys()
    assert all(np.allclose(found[name], VALUES[name], rtol=1e-6) for name in VALUES)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_stacks_have_a_row_for_each_expert(tmp_path):
    stack = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    for suffix in ("dat", "gguf"):
        write_imatrix(tmp_path / f"i.{suffix}", {"blk.0.ffn_up_exps.weight": stack}, rows=5)
        found = read_imatrix(tmp_path / f"i.{suffix}")["blk.0.ffn_up_exps.weight"]
        assert np.allclose(found, stack.reshape(-1), rtol=1e-6)
    shapes = {tensor.name: tensor.data.shape for tensor in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    assert shapes == {"blk.0.ffn_up_exps.weight.in_sum2": (3, 4), "blk.0.ffn_up_exps.weight.counts": (3, 1)}


def test_the_older_format_by_hand(tmp_path):
    """Sums over three calls; what follows the entries is not needed."""
    name, sums = b"blk.0.ffn_up.weight", (3.0, 6.0)
    data = struct.pack("<ii19sii2f", 1, len(name), name, 3, 2, *sums)
    (tmp_path / "old.dat").write_bytes(data)
    assert read_imatrix(tmp_path / "old.dat")["blk.0.ffn_up.weight"].tolist() == [1.0, 2.0]


def test_names_of_the_model_and_of_the_file_find_their_tensor(tmp_path):
    model = small_model()
    placed = placements(architecture_of(model), model)
    by_model, notes = importance_by_tensor({"model.layers.0.self_attn.q_proj.weight": torch.ones(64)}, placed)
    assert list(by_model) == ["blk.0.attn_q.weight"] and notes == ()
    write_imatrix(tmp_path / "i.gguf", VALUES | {"blk.9.attn_q.weight": VALUES["output.weight"]})
    by_file, notes = importance_by_tensor(tmp_path / "i.gguf", placed)
    assert by_file.keys() == VALUES.keys()
    assert notes == ("1 entries of the importance have no tensor here: blk.9.attn_q.weight ...",)
    with pytest.raises(ExportError, match=r"names other ..., none of which"):
        importance_by_tensor({"other": torch.ones(4)}, placed)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
        read_imatrix(tmp_path / "none.dat")
