import pytest
import torch

from ptqc.engine.activations import Activations

KINDS = {"memory": {"on_disk": False}, "disk": {"on_disk": True}, "spilled": {"budget": 100}}


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(4, 6, 8, generator=generator)
    return {
        "plain": wide,
        "turned": torch.randn(3, 5, 7, generator=generator).permute(2, 0, 1),
        "part": wide[:, 1:3],
        "same": wide.view(24, 8),
        "half": wide.to(torch.bfloat16),
        "mask": wide > 0,
        "number": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_values_come_back_bit_for_bit_with_their_strides(kind, tmp_path):
    with Activations(3, folder=tmp_path, **KINDS[kind]) as store:
        for batch in range(3):
            store.update(batch, values(batch), values(batch))
        assert store.is_on_disk == (kind != "memory")
        for batch in range(3):
            for name, value in values(batch).items():
                found = store.values(batch)[name]
                assert found.dtype == value.dtype and torch.equal(found, value)
                assert name == "part" or found.stride() == value.stride(), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_kept_is_gone(kind, tmp_path):
    with Activations(2, folder=tmp_path, **KINDS[kind]) as store:
        store.update(0, {"a": torch.ones(50), "b": torch.ones(2)}, ("a", "b"))
        store.update(0, {"c": torch.zeros(3), "d": torch.zeros(9)}, ("b", "c"))
        assert sorted(store.values(0)) == ["b", "c"]
        assert store.values(1) == {}
        assert store.nbytes == 20


def test_a_part_of_a_larger_value_does_not_hold_the_rest():
    with Activations(1) as store:
        store.update(0, {"part": torch.zeros(1000, 4)[:2]}, ("part",))
        assert store.values(0)["part"].untyped_storage().nbytes() == 32


def test_memory_is_enough_below_the_budget(tmp_path):
    with Activations(2, budget=4096, folder=tmp_path) as store:
        store.update(0, {"a": torch.zeros(1000)}, ("a",))
        assert not store.is_on_disk
        store.update(1, {"a": torch.ones(1000)}, ("a",))
        assert store.is_on_disk and len(list(tmp_path.glob("*/*.safetensors"))) == 2
        assert torch.equal(store.values(1)["a"], torch.ones(1000))
