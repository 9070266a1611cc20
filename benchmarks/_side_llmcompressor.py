"""llm-compressor's side of `gptq_awq_vs_peers`, run by the Python that has it.

    python _side_llmcompressor.py CASE.json

See `gptq_awq_vs_peers.Case` for what it reads and writes. Nothing of ptqc is imported here.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None  # 0.14.0.1 pins memory, which takes an accelerator


def recipe(case):
    """Symmetric groups for GPTQ, asymmetric ones for AWQ; everything else as the package has it."""
    weights = {
        "num_bits": case["bits"], "type": "int", "strategy": "group", "group_size": case["group"],
        "symmetric": case["method"] == "gptq",
    }  # fmt: skip
    common = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if case["method"] == "gptq":
        if case["act_order"]:
            weights["actorder"] = "weight"
        return GPTQModifier(**common)
    try:
        from llmcompressor.modifiers.transform.awq import AWQModifier
    except ImportError:
        from llmcompressor.modifiers.awq import AWQModifier
    try:
        return [AWQModifier(**common)]
    except (TypeError, ValueError):
        from llmcompressor.modifiers.quantization import QuantizationModifier

        return [AWQModifier(), QuantizationModifier(**common)]


def main():
    case = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(case["threads"])
    rows = load_file(case["tokens"])["tokens"].tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    made = recipe(case)
    started = time.perf_counter()
    oneshot(model=model, recipe=made, dataset=data, num_calibration_samples=len(rows), max_seq_length=len(rows[0]))
    seconds = time.perf_counter() - started
    numbers = {name: tensor.detach().float() for name, tensor in model.named_parameters()}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero = getattr(module, "weight_zero_point", None)
            weight = fake_quantize(module.weight, module.weight_scale, zero, scheme.weights)
            numbers[f"{name}.weight"] = weight.detach().float()
    save_file({name: tensor.contiguous().clone() for name, tensor in numbers.items()}, case["numbers"])
    versions = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    Path(case["result"]).write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
