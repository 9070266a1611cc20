"""Folders in other programs' dialects, both ways: ours opened by them, theirs opened by us; how far logits differ.

    python -m benchmarks.dialects [--python NAME=PATH ...] [--only WORDS] [--model FOLDER] [--json FILE]

NAME is what a case runs with: gptqmodel (with optimum), compressed-tensors, llmcompressor, transformers4 (4.57 with
hqq), bitsandbytes, hqq, each a Python that has the package and transformers; without a PATH the last two run with this
Python, and the others are listed as not run. `pip install gptqmodel optimum` and `pip install llmcompressor` need
environments of their own.

The reference model, 64 tokens, logits in float32: relative error ||theirs - ours|| / ||ours||. Where inputs are
quantized, or a kernel works in 16 bit, what the program computes differs by more than what the file holds; such cases
say so under `because`. Rows of other cases that FILE holds already are kept.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ptqc
from benchmarks import reference

SIDE = Path(__file__).parent / "_side_dialects.py"
TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One folder. python: what the other side runs with. ours: the arguments of `ptqc.quantize` and `ptqc.export` for
    folders that we write; theirs: what their side is told for folders that they write; load: how they open it.
    because: why their arithmetic differs, where it does. steps: of inputs, where they round them otherwise."""

    name: str
    format: str
    python: str
    load: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    because: str = ""
    steps: float = 0.0


def _hf(dtype="float32", **more):
    return {"loader": "transformers", "dtype": dtype, **more}


def _gptq(bits=4):
    return _hf(config=["GPTQConfig", {"bits": bits, "backend": "gptq_torch"}])


_AWQ = _hf(config=["AwqConfig", {"bits": 4, "backend": "torch_awq"}])
_HALF = "GPTQModel's PyTorch kernel has weights in float16"
_BF16 = "the kernel works in bfloat16"
_ASYM = _hf(config=["CompressedTensorsConfig", {"dequantize": True}])
_DEQUANTIZED = "the package decodes weights in float16"
_DYNAMIC = "the package simulates int8 inputs in steps of max / 127.5, ours are max / 127"
_TRAINING = _hf(in_training=True)
_CT, _BNB = "compressed-tensors", "bitsandbytes"


def _w(spec, method="rtn", **more):
    return {"method": method, "spec": spec, **more}


WRITTEN = [
    Case("gptq int4g128", "gptq", "gptqmodel", _gptq(), _w("int4g128"), because=_HALF),
    Case("gptq int4g128, default kernel", "gptq", "gptqmodel", _hf(), _w("int4g128"), because=_BF16),
    Case("gptq int4g128, GPTQModel.load", "gptq", "gptqmodel",
         {"loader": "gptqmodel", "dtype": "float16", "backend": "TORCH"}, _w("int4g128"),
         because="the whole model in float16"),
    Case("gptq int4g128z (v2)", "gptq", "gptqmodel", _gptq(), _w("int4g128z"), because=_HALF),
    Case("gptq int4g64 (v2)", "gptq", "gptqmodel", _gptq(), _w("int4g64"), {"version": "gptq_v2"}, because=_HALF),
    Case("gptq int4g128 act-order", "gptq", "gptqmodel", _gptq(), _w("int4g128", "gptq", act_order=True),
         because=_HALF),
    Case("gptq int4 whole rows", "gptq", "gptqmodel", _gptq(), _w("int4"), because=_HALF),
    Case("gptq int8g128", "gptq", "gptqmodel", _gptq(8), _w("int8g128"), because=_HALF),
    Case("gptq int3g128", "gptq", "gptqmodel", _gptq(3), _w("int3g128"), because=_HALF),
    Case("gptq int2g64z (v2)", "gptq", "gptqmodel", _gptq(2), _w("int2g64z"), because=_HALF),
    Case("awq int4g128z", "awq", "gptqmodel", _AWQ, _w("int4g128z"), because=_HALF),
    Case("awq int4g64", "awq", "gptqmodel", _AWQ, _w("int4g64"), because=_HALF),
    Case("ct int4g128", _CT, _CT, _hf(), _w("int4g128")),
    Case("ct int4 whole rows", _CT, _CT, _hf(), _w("int4")),
    Case("ct int3g128", _CT, _CT, _hf(), _w("int3g128")),
    Case("ct int8g128", _CT, _CT, _hf(), _w("int8g128")),
    Case("ct int4g128z", _CT, _CT, _ASYM, _w("int4g128z"), because=_DEQUANTIZED),
    Case("ct int8g128z", _CT, _CT, _ASYM, _w("int8g128z"), because=_DEQUANTIZED),
    Case("ct int8, inputs int8 per token", _CT, _CT, _hf(), _w("int8", activation="int8-token"),
         because=_DYNAMIC, steps=127.5),
    Case("ct int8, inputs int8 static", _CT, _CT, _hf(), _w("int8", activation="int8-tensor-static")),
    Case("ct fp8 per row, inputs fp8 per token", _CT, _CT, _hf(), _w("fp8e4m3", activation="fp8e4m3-token")),
    Case("ct fp8 per tensor, inputs fp8 static", _CT, _CT, _hf(), _w("fp8e4m3t", activation="fp8e4m3-tensor-static")),
    Case("ct fp8 blocks", _CT, _CT, _hf(), _w("fp8e4m3b128x128")),
    Case("ct mxfp4", _CT, _CT, _hf("bfloat16"), _w("mxfp4"), because="the whole model in bfloat16"),
    Case("bnb nf4g64", _BNB, _BNB, _TRAINING, _w("nf4g64", "nf4")),
    Case("bnb nf4g64, default kernel", _BNB, _BNB, _hf(), _w("nf4g64", "nf4"),
         because="where the processor has AVX512-BF16, the kernel works in bfloat16"),
    Case("bnb nf4g64dq", _BNB, _BNB, _TRAINING, _w("nf4g64dq", "nf4")),
    Case("bnb fp4g128", _BNB, _BNB, _TRAINING, _w("fp4g128", "fp4")),
    Case("bnb int8, inputs int8 with outliers", _BNB, _BNB, _hf(), {"method": "llm_int8"},
         because="inputs are rounded in float16, ours in float32"),
    Case("hqq int4g64f", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int4g64f", "hqq")),
    Case("hqq int3g64f", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int3g64f", "hqq")),
    Case("hqq int2g64z", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int2g64z")),
    Case("hqq int8g128", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int8g128")),
    Case("hqq int4g64f, transformers 4", "hqq", "transformers4", _hf(), _w("int4g64f", "hqq")),
    Case("hqq int2g64z, transformers 4", "hqq", "transformers4", _hf(), _w("int2g64z")),
]  # fmt: skip


def _made(maker, **fields):
    return {"maker": maker, "fields": fields}


def _int(bits, group, symmetric=True):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


READ = [
    Case("GPTQModel 4 bits", "gptq", "gptqmodel", _gptq(), theirs=_made("gptqmodel", bits=4, group_size=128),
         because=_HALF),
    Case("GPTQModel 4 bits, zero points (v1)", "gptq", "gptqmodel", _gptq(),
         theirs=_made("gptqmodel", bits=4, group_size=128, sym=False), because=_HALF),
    Case("GPTQModel 4 bits, zero points (v2)", "gptq", "gptqmodel", _gptq(),
         theirs=_made("gptqmodel", bits=4, group_size=128, sym=False, format="gptq_v2"), because=_HALF),
    Case("GPTQModel 4 bits, act-order", "gptq", "gptqmodel", _gptq(),
         theirs=_made("gptqmodel", bits=4, group_size=128, desc_act=True, act_group_aware=False), because=_HALF),
    Case("GPTQModel 8 bits", "gptq", "gptqmodel", _gptq(8), theirs=_made("gptqmodel", bits=8, group_size=128),
         because=_HALF),
    Case("GPTQModel 3 bits", "gptq", "gptqmodel", _gptq(3), theirs=_made("gptqmodel", bits=3, group_size=128),
         because=_HALF),
    Case("GPTQModel 2 bits", "gptq", "gptqmodel", _gptq(2), theirs=_made("gptqmodel", bits=2, group_size=64),
         because=_HALF),
    Case("GPTQModel AWQ", "awq", "gptqmodel", _AWQ, theirs=_made("gptqmodel", bits=4, group_size=128, is_awq=True),
         because=_HALF),
    Case("llm-compressor W4A16 (GPTQ)", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="gptq", scheme="W4A16")),
    Case("llm-compressor W4A16 with zero points", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", scheme="W4A16_ASYM")),
    Case("llm-compressor 3 bits", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", **_int(3, 128))),
    Case("llm-compressor W8A8", _CT, "llmcompressor", _hf(), theirs=_made("llmcompressor", kind="rtn", scheme="W8A8"),
         because=_DYNAMIC, steps=127.5),
    Case("llm-compressor FP8_DYNAMIC", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", scheme="FP8_DYNAMIC")),
    Case("llm-compressor FP8 (static)", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", scheme="FP8")),
    Case("bitsandbytes nf4", _BNB, _BNB, _TRAINING,
         theirs=_made("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    Case("bitsandbytes nf4, nested", _BNB, _BNB, _TRAINING,
         theirs=_made("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    Case("bitsandbytes fp4", _BNB, _BNB, _TRAINING,
         theirs=_made("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    Case("bitsandbytes int8", _BNB, _BNB, _hf(), theirs=_made("bitsandbytes", load_in_8bit=True),
         because="inputs are rounded in float16, ours in float32"),
    Case("hqq 4 bits", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"},
         theirs=_made("hqq", nbits=4, group_size=64, axis=1)),
    Case("hqq 3 bits", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"},
         theirs=_made("hqq", nbits=3, group_size=64, axis=1)),
]  # fmt: skip


def ask(python, case, work, ids, extra):
    """What their side wrote: logits, and what it says; or None and why it failed."""
    told = {**case.load, **extra, "ids": ids, "result": str(work / "result.safetensors"), "threads": 1}
    (work / "case.json").write_text(json.dumps(told))
    done = subprocess.run([python, str(SIDE), str(work / "case.json")], capture_output=True, text=True, cwd=work)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return None, {"failed": lines[-1][:300] if lines else "no reason given"}
    said = json.loads((work / "result.json").read_text())
    return load_file(work / "result.safetensors")["logits"], said


@torch.no_grad()
def logits_of(model, ids):
    """Our logits in float32."""
    return model(input_ids=torch.tensor([ids])).logits.float()


def written(case, python, work, source, ids, calibration):
    """A folder of ours, opened by them."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    request = dict(case.ours)
    method = request.pop("method")
    needs_data = method == "gptq" or "static" in str(request.get("activation"))
    ptqc.quantize(model, method, **request, calibration=calibration if needs_data else None, progress=False)
    if case.load["dtype"] == "bfloat16":
        model = model.bfloat16()
    folder = work / "folder"
    report = ptqc.export(model, case.format, folder, tokenizer=source, **case.export)
    theirs, said = ask(python, case, work, ids, {"folder": str(folder)})
    return logits_of(model, ids), theirs, said | {"bytes": report.nbytes} | _closer(case, model, source, theirs, ids)


def read(case, python, work, source, ids, calibration):
    """A folder of theirs, opened by us."""
    folder = work / "folder"
    rows = [row.flatten().tolist() for row in calibration]
    more = {"folder": str(folder), "model": source, "calibration": rows, **case.theirs}
    theirs, said = ask(python, case, work, ids, more)
    if theirs is None:
        return None, None, said
    model = ptqc.load(folder, dtype=torch.float32).eval()
    return logits_of(model, ids), theirs, said | _closer(case, model, source, theirs, ids)


def _closer(case, model, source, theirs, ids):
    """The error once inputs are rounded as they do it."""
    if theirs is None or not case.steps:
        return {}
    return {"relative_with_their_steps": _relative(theirs, with_their_steps(model, source, case.steps, ids))}


def measure(case, direction, pythons, source, ids, calibration):
    """A row of the results."""
    row = {"case": case.name, "format": case.format, "direction": direction, "because": case.because}
    row["model"] = Path(source).name
    python = pythons.get(case.python)
    if python is None:
        return row | {"failed": f"not run: no Python with {case.python} given"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        act = written if direction == "written" else read
        ours, theirs, said = act(case, python, Path(folder), source, ids, calibration)
    row |= said | {"seconds": round(time.perf_counter() - started, 1)}
    if theirs is None:
        return row
    largest = (theirs - ours).abs().max().item()
    return row | {"relative": _relative(theirs, ours), "largest": largest}


def _relative(theirs, ours):
    return ((theirs - ours).norm() / ours.norm()).item()


@torch.no_grad()
def with_their_steps(model, source, steps, ids):
    """The logits of our weights where inputs are rounded as the other program rounds them: symmetric int8 per token,
    `steps` to the largest magnitude."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def round_input(module, inputs):
        step = (inputs[0].abs().amax(-1, keepdim=True) / steps).clamp_min(1e-30)
        return ((inputs[0] / step).round().clamp(-128, 127) * step,)

    for name, weight in model.named_parameters():
        if isinstance(weight, ptqc.QuantTensor):
            module = plain.get_submodule(name.removesuffix(".weight"))
            module.weight.copy_(weight.dequantize())
            module.register_forward_pre_hook(round_input)
    return logits_of(plain, ids)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--model", default=str(reference.FOLDER), help="a Llama with that tokenizer")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pythons = {"bitsandbytes": sys.executable, "hqq": sys.executable}
    pythons |= dict(pair.split("=", 1) for pair in chosen.python)
    calibration = [window[:, :256] for window in reference.calibration("docs", windows=8)]
    ids = reference.tokens("docs")[1][:TOKENS].tolist()
    table = Table("case", "direction", "relative error", "layers", "because")
    rows = json.loads(chosen.json.read_text())["rows"] if chosen.json and chosen.json.exists() else []
    for direction, cases in (("written", WRITTEN), ("read", READ)):
        for case in cases:
            if chosen.only not in f"{case.name} {direction} {case.python}":
                continue
            row = measure(case, direction, pythons, chosen.model, ids, calibration)
            rows = [old for old in rows if (old["case"], old["direction"]) != (case.name, direction)] + [row]
            shown = f"{row['relative']:.1e}" if "relative" in row else row["failed"]
            print(f"{direction}: {case.name}: {shown}", file=sys.stderr, flush=True)
            table.add_row(case.name, direction, shown, " ".join(row.get("layers", [])), row["because"])
            if chosen.json is not None:
                document = {"date": date.today().isoformat(), "machine": platform.machine(), "tokens": TOKENS}
                chosen.json.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
