"""GPTQModel's side of `gptq_awq_vs_peers`, run by the Python that has it: `python _side_gptqmodel.py CASE.json`.

See `gptq_awq_vs_peers.Case` for what it reads and writes. Nothing of ptqc is imported here. Without act-order it
quantizes as it does by default, in an order of its own that keeps groups as they are stored ("act group aware").
"""

import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.6 does not start on two cores otherwise

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer


def configuration(case):
    """Symmetric groups for GPTQ, asymmetric ones for AWQ; everything else as the package has it."""
    common = {"bits": case["bits"], "group_size": case["group"]}
    if case["method"] == "awq":
        made = QuantizeConfig(**common, quant_method=METHOD.AWQ, format=FORMAT.GEMM)
    elif case["act_order"]:
        made = QuantizeConfig(**common, desc_act=True, act_group_aware=False)
    else:
        made = QuantizeConfig(**common)
    made.device = "cpu"
    return made


def main():
    case = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(case["threads"])
    rows = load_file(case["tokens"])["tokens"].tolist()
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    is_awq = case["method"] == "awq"
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    # On a CPU, AWQ takes its backend by name and a model in 16 bits.
    model = GPTQModel.load(case["model"], configuration(case), dtype=torch.float16 if is_awq else torch.float32)
    started = time.perf_counter()
    backend = BACKEND.AWQ_TORCH if is_awq else BACKEND.AUTO
    model.quantize(data, batch_size=4, tokenizer=tokenizer, backend=backend)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        stored = GPTQModel.load(
            folder, device="cpu", dtype=torch.float16, backend=BACKEND.AWQ_TORCH if is_awq else BACKEND.TORCH
        ).model
        save_file(numbers_of(stored), case["numbers"])
    versions = {name: version(name) for name in ("gptqmodel", "transformers", "torch")}
    Path(case["result"]).write_text(json.dumps({"seconds": seconds, "versions": versions}))


@torch.no_grad()
def numbers_of(model):
    """Its weights by name; a quantized linear shows its own as the image of the identity."""
    numbers = {name: tensor.float().contiguous().clone() for name, tensor in model.named_parameters()}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            unit = torch.eye(module.in_features, dtype=torch.float16)
            numbers[f"{name}.weight"] = module(unit).float().t().contiguous()
    return numbers


if __name__ == "__main__":
    main()
