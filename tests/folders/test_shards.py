import json

import pytest
import torch
from safetensors.torch import load_file

from ptqc.folders.safefile import read_safefile
from ptqc.folders.shards import INDEX_NAME, Block, TensorWriter, assign_shards, write_shards, written_bytes


def block(name: str, *tensors: torch.Tensor) -> Block:
    named = {f"{name}.{i}": tensor for i, tensor in enumerate(tensors)}

    def produce(append):
        for part, tensor in named.items():
            append(part, tensor)

    return Block(name, {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in named.items()}, produce)


BLOCKS = [
    block("a", torch.arange(7, dtype=torch.uint8), torch.ones(3, dtype=torch.float64)),
    block("b", torch.arange(10, dtype=torch.float32)),
    block("c", torch.arange(5, dtype=torch.bfloat16), torch.tensor(True)),
]


def test_wide_types_come_first_so_that_every_tensor_is_aligned(tmp_path):
    write_shards(tmp_path, assign_shards(BLOCKS, 10**9))
    for entry in read_safefile(tmp_path / "model.safetensors").entries.values():
        assert entry.start % entry.dtype.itemsize == 0


def test_a_tensor_may_be_written_in_pieces_and_in_any_order(tmp_path):
    x, y = torch.arange(10.0), torch.arange(6, dtype=torch.int16)
    with TensorWriter(tmp_path / "x.safetensors", {"x": ((10,), x.dtype), "y": ((2, 3), y.dtype)}) as writer:
        for start in range(0, 10, 3):
            writer.append("x", x[start : start + 3])
            if start == 3:
                writer.append("y", y.view(torch.uint8))
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["x"], x)
    assert torch.equal(loaded["y"], y.view(2, 3))


def test_an_incomplete_or_overlong_tensor_is_caught(tmp_path):
    layout = {"x": ((2,), torch.int8)}
    with pytest.raises(AssertionError, match="incomplete"), TensorWriter(tmp_path / "1", layout) as writer:
        writer.append("x", torch.zeros(1, dtype=torch.int8))
    with pytest.raises(AssertionError, match="longer"), TensorWriter(tmp_path / "2", layout) as writer:
        writer.append("x", torch.zeros(3, dtype=torch.int8))


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (72, 2), (60, 2), (45, 3), (1, 3)])
def test_blocks_stay_whole_and_files_below_the_limit(tmp_path, limit, files):
    shards = assign_shards(BLOCKS, limit)
    write_shards(tmp_path, shards)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == files
    assert sum(file.stat().st_size for file in written) == written_bytes(shards)
    if files > 1:
        assert written[0].name == f"model-00001-of-{files:05d}.safetensors"
        index = json.loads((tmp_path / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == 7 + 24 + 40 + 10 + 1
        held = {file.name: set(read_safefile(file).entries) for file in written}
        assert all(name in held[file] for name, file in index["weight_map"].items())
        assert index["weight_map"]["a.0"] == index["weight_map"]["a.1"]
