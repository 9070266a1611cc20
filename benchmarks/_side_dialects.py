"""The other program's side of `dialects`, run by the Python that has it: `python _side_dialects.py CASE.json`.

Nothing of ptqc is imported here. A case says what to do with which folder:

    load   open `folder` with `loader` and write the logits of `ids`
    make   quantize the model in `model` with `maker` into `folder`, open that, and write the logits of `ids`

and where to write: `result`, safetensors with "logits" [1, tokens, vocabulary] float32.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.6 does not start on two cores otherwise
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file


def from_transformers(case):
    """from_pretrained, with a configuration of how to run it where one is needed."""
    import transformers

    more = {}
    if case.get("config"):
        kind, fields = case["config"]
        more["quantization_config"] = getattr(transformers, kind)(**fields)
    dtype = getattr(torch, case["dtype"])
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        case["folder"], dtype=dtype, output_loading_info=True, **more
    )
    assert not report["missing_keys"], report["missing_keys"]
    # bitsandbytes repacks weights for a bfloat16 kernel unless a model is in training; there is no dropout here.
    return model.train(case.get("in_training", False))


def from_gptqmodel(case):
    """GPTQModel's own loader."""
    from gptqmodel import BACKEND, GPTQModel

    backend = getattr(BACKEND, case["backend"])
    return GPTQModel.load(case["folder"], dtype=getattr(torch, case["dtype"]), device="cpu", backend=backend).model


def from_hqq(case):
    """hqq's layers, filled by their own load_state_dict; no transformers 5 opens these folders."""
    import transformers
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    tensors = load_file(Path(case["folder"]) / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(case["folder"])
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case["dtype"])).eval()
    layers = [name.removesuffix(".W_q") for name in tensors if name.endswith(".W_q")]
    inside = tuple(f"{name}." for name in layers)
    floats = {name: value for name, value in tensors.items() if not name.startswith(inside)}
    missing, unexpected = model.load_state_dict(floats, strict=False)
    assert not unexpected and not [name for name in missing if not name.startswith(inside)], missing
    for name in layers:
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        layer = HQQLinear(None, BaseQuantizeConfig(), compute_dtype=getattr(torch, case["dtype"]), device="cpu")
        layer.load_state_dict(own)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return model


LOADERS = {"transformers": from_transformers, "gptqmodel": from_gptqmodel, "hqq": from_hqq}


# -------------------------------------------------------------------- making


def make_gptqmodel(case):
    """A folder by GPTQModel."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD
    from transformers import AutoTokenizer

    fields = dict(case["fields"])
    is_awq = fields.pop("is_awq", False)
    if is_awq:
        fields |= {"quant_method": METHOD.AWQ, "format": FORMAT.GEMM}
    config = QuantizeConfig(**fields)
    config.device = "cpu"
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in case["calibration"]]
    model = GPTQModel.load(case["model"], config, dtype=torch.float16 if is_awq else torch.float32)
    backend = BACKEND.AWQ_TORCH if is_awq else BACKEND.AUTO
    model.quantize(data, batch_size=1, tokenizer=AutoTokenizer.from_pretrained(case["model"]), backend=backend)
    model.save(case["folder"])


def make_llmcompressor(case):
    """A folder by llm-compressor."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM

    fields = dict(case["fields"])
    kind = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[fields.pop("kind")]
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    rows = case["calibration"]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    recipe = kind(targets="Linear", ignore=["lm_head"], **fields)
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=len(rows), max_seq_length=len(rows[0]))
    model.save_pretrained(case["folder"], save_compressed=True)


def make_bitsandbytes(case):
    """A folder by transformers with bitsandbytes."""
    import transformers

    config = transformers.BitsAndBytesConfig(**case["fields"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        case["model"], quantization_config=config, dtype=getattr(torch, case["dtype"])
    )
    model.save_pretrained(case["folder"])


def make_hqq(case):
    """A folder of the state dicts of hqq's layers, which is what transformers 4 saves."""
    import transformers
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(**case["fields"])
    model = transformers.AutoModelForCausalLM.from_pretrained(case["model"], dtype=getattr(torch, case["dtype"]))
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        layer = HQQLinear(module, config, compute_dtype=getattr(torch, case["dtype"]), device="cpu", del_orig=False)
        layer.encoded_state_dict = True
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in layer.state_dict().items()}
    model.config.save_pretrained(case["folder"])
    path = Path(case["folder"]) / "config.json"
    fields = json.loads(path.read_text())
    fields["quantization_config"] = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
    path.write_text(json.dumps(fields, default=str))
    save_file(tensors, Path(case["folder"]) / "model.safetensors", metadata={"format": "pt"})


MAKERS = {
    "gptqmodel": make_gptqmodel, "llmcompressor": make_llmcompressor, "bitsandbytes": make_bitsandbytes,
    "hqq": make_hqq,
}  # fmt: skip


@torch.no_grad()
def main():
    case = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(case["threads"])
    if "maker" in case:
        with torch.enable_grad():
            MAKERS[case["maker"]](case)
    model = LOADERS[case["loader"]](case)
    logits = model(input_ids=torch.tensor([case["ids"]])).logits.float()
    kinds = sorted({type(module).__name__ for name, module in model.named_modules() if name.endswith("q_proj")})
    packages = ("transformers", "torch", "gptqmodel", "compressed-tensors", "llmcompressor", "bitsandbytes", "hqq")
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except ImportError:
            continue
    save_file({"logits": logits.contiguous()}, case["result"], metadata={"layers": " ".join(kinds)})
    Path(case["result"]).with_suffix(".json").write_text(json.dumps({"versions": versions, "layers": kinds}))


if __name__ == "__main__":
    main()
