"""Statistics of two processes are those of one. The file is also the program that each of them runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ptqc.passes.observe.run import observe
from ptqc.statistics import STATISTICS

ROOT = Path(__file__).parents[2]


class Experts(nn.Module):
    """A matrix that every batch reads, and a stack whose experts most batches pass by."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(8, 12, generator=generator))
        self.stack = nn.Parameter(torch.randn(3, 8, 8, generator=generator))

    def forward(self, x, ids):
        hidden = torch.nn.functional.linear(x, self.first)
        return torch.bmm(hidden[:, None], self.stack[ids].mT)[:, 0]


def statistics():
    """Of five batches: an odd number, of different lengths."""
    model = Experts()
    generator = torch.Generator().manual_seed(1)
    sizes = [120 + 50 * number for number in range(5)]
    batches = [
        {"x": torch.randn(size, 12, generator=generator), "ids": torch.arange(size) % (number % 2 + 1)}
        for number, size in enumerate(sizes)
    ]
    recorder = observe(model, batches, dict.fromkeys(model.parameters(), STATISTICS))
    return {name: recorder.statistics(weight) for name, weight in model.named_parameters()}


def main(path):
    torch.distributed.init_process_group("gloo")
    found = statistics()
    torch.save(found, f"{path}/{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    common["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, str(tmp_path)]
    workers = [subprocess.Popen(command, env={**common, "RANK": str(rank)}, cwd=ROOT) for rank in range(2)]
    expected = statistics()
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    assert expected["stack"]["count"][2] == 0 and expected["first"]["rows"].shape == (512, 12)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, values in expected.items():
            for key, value in values.items():
                assert value.shape == found[name][key].shape
                if key in ("absmax", "count", "rows", "percentile"):
                    assert torch.equal(found[name][key], value), (name, key)
                torch.testing.assert_close(found[name][key], value, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main(sys.argv[1])
