"""Our side of `gptq_awq_vs_peers`: quantizes one case in a process of its own, as each peer does.

python -m benchmarks._side_ptqc CASE.json     see `gptq_awq_vs_peers.Case` for what it reads and writes
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ptqc


def main():
    case = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(case["threads"])
    data = list(load_file(case["tokens"])["tokens"].split(1))
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).eval()
    options = {"gptq": {"act_order": "static" if case["act_order"] else False}, "awq": {}}[case["method"]]
    started = time.perf_counter()
    ptqc.quantize(
        model, case["method"], bits=case["bits"], group_size=case["group"], calibration=data, progress=False, **options
    )
    seconds = time.perf_counter() - started
    numbers = {
        name: (weight.dequantize() if isinstance(weight, ptqc.QuantTensor) else weight.detach()).float()
        for name, weight in model.named_parameters()
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in numbers.items()}, case["numbers"])
    Path(case["result"]).write_text(json.dumps({"seconds": seconds, "versions": {"ptqc": version("ptqc")}}))


if __name__ == "__main__":
    main()
