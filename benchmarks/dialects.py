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
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import ptqc
from benchmarks import reference
from benchmarks._dialect_cases import READ, WRITTEN

SIDE = Path(__file__).parent / "_side_dialects.py"
TOKENS = 64


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


def of_conv1d(tokenizer, folder):
    """A random model of two layers whose weights are those of Conv1D, with a tokenizer."""
    torch.manual_seed(0)
    given = AutoTokenizer.from_pretrained(tokenizer)
    config = GPT2Config(
        n_embd=256, n_layer=2, n_head=4, vocab_size=len(given), bos_token_id=0, eos_token_id=1, initializer_range=0.06,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    given.save_pretrained(folder)
    return str(folder)


def measure(case, direction, pythons, source, ids, calibration):
    """A row of the results."""
    row = {"case": case.name, "format": case.format, "direction": direction, "because": case.because}
    row["model"] = "a random GPT-2" if case.is_conv1d else Path(source).name
    python = pythons.get(case.python)
    if python is None:
        return row | {"failed": f"not run: no Python with {case.python} given"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        act = written if direction == "written" else read
        source = of_conv1d(source, Path(folder) / "source") if case.is_conv1d else source
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
