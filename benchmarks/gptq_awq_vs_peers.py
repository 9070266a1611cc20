"""GPTQ and AWQ beside llm-compressor and GPTQModel: the same tokens, in one run, scored the same way.

    python -m benchmarks.gptq_awq_vs_peers [--llmcompressor-python PATH] [--gptqmodel-python PATH] [--json FILE]

4 and 3 bits in groups of 128, GPTQ symmetric with and without act-order, AWQ asymmetric. Every case runs in a process
of its own (`_side_*.py`), ours too, with the same number of threads, and is timed from the call that quantizes to its
return. What it made of the weights is put into the float model here, so perplexity and KL to the float model
are computed by one program. A peer without a Python, or that fails, is listed as not run.

The peers need virtual environments of their own: `pip install llmcompressor`, and `pip install gptqmodel optimum`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import reference
from ptqc.evaluate import evaluate, record
from ptqc.texts import tokenize

HERE = Path(__file__).parent
CASES = [("gptq", 4, False), ("gptq", 4, True), ("gptq", 3, False), ("gptq", 3, True), ("awq", 4, False),
         ("awq", 3, False)]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a side is told. It reads `tokens` ("tokens" [windows, window] int64, safetensors), quantizes every linear
    of the model in the folder `model` but the head, and writes `numbers` (float32 weights by name, safetensors) and
    `result` (JSON: seconds, versions)."""

    model: str
    tokens: str
    method: str
    bits: int
    group: int
    act_order: bool
    threads: int
    numbers: str
    result: str


def run(side, python, case):
    """What the side wrote as its result, or {"failed": why}."""
    if python is None:
        return {"failed": "not run: no Python given"}
    command = [python, "-m", "benchmarks._side_ptqc"] if side == "ptqc" else [python, str(HERE / f"_side_{side}.py")]
    path = Path(case.result).with_suffix(".case")
    path.write_text(json.dumps(asdict(case)))
    # Peers leave logs where they run.
    where = HERE.parent if side == "ptqc" else path.parent
    done = subprocess.run([*command, str(path)], cwd=where, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {"failed": f"not run: {last[:200]}"}
    return json.loads(Path(case.result).read_text())


def scored(model, case, recorded):
    """Perplexity and KL of the float model with the weights of a case."""
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    numbers = load_file(case.numbers)
    missing, unexpected = model.load_state_dict(numbers, strict=False)
    if missing or unexpected:
        # Scales and zeros of the peers are parameters too; a weight that is missing would be scored as float.
        assert not [name for name in missing if name.endswith(".weight")], missing
    found = {}
    for text, expected in recorded.items():
        evaluation = evaluate(model, expected.windows.flatten(), against=expected)
        found[text] = {"perplexity": evaluation.perplexity, "kl": evaluation.kl}
    model.load_state_dict(original)
    return found


def with_ratios(rows, first):
    """Add, to our rows, the ratios to the best perplexity and the least time among the peers of the same case."""
    for row in rows:
        peers = [
            other for other in rows
            if other["case"] == row["case"] and other["side"] != "ptqc" and "seconds" in other
        ]  # fmt: skip
        if row["side"] == "ptqc" and peers and "seconds" in row:
            for measure in ("perplexity", "kl"):
                row[f"{measure}_ratio"] = row[first][measure] / min(other[first][measure] for other in peers)
            row["time_ratio"] = row["seconds"] / min(other["seconds"] for other in peers)
    return rows


def show(rows, texts):
    """The table."""
    names = [f"{measure}, {text}" for text in texts for measure in ("perplexity", "KL")]
    table = Table("case", "side", *names, "perplexity / best peer", "KL / best peer", "seconds", "time / fastest peer")
    for row in rows:
        if "failed" in row:
            table.add_row(row["case"], row["side"], row["failed"])
            continue
        values = [f"{row[text][key]:.4f}" for text in texts for key in ("perplexity", "kl")]
        ratios = [f"{row[key]:.4f}" if key in row else "" for key in ("perplexity_ratio", "kl_ratio")]
        time_ratio = f"{row['time_ratio']:.2f}" if "time_ratio" in row else ""
        table.add_row(row["case"], row["side"], *values, *ratios, f"{row['seconds']:.1f}", time_ratio)
    Console(width=200).print(table)


def recordings(model, texts, extra, windows, folder):
    """Log-probabilities of the float model on the parts of the texts for scoring, and on a file, by name."""
    scored_on = {text: reference.tokens(text)[1] for text in texts}
    if extra:
        tokenizer = reference.AutoTokenizer.from_pretrained(reference.FOLDER)
        scored_on[extra.stem] = tokenize(extra.read_text(encoding="utf-8"), tokenizer)
    return {
        name: record(model, ids, Path(folder) / f"{name}.float", windows=windows) for name, ids in scored_on.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor-python")
    parser.add_argument("--gptqmodel-python")
    parser.add_argument("--samples", type=int, default=128, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--windows", type=int, default=32, help="windows to score")
    parser.add_argument("--text", type=Path, help="a text to score on as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="*", help="such as gptq4 gptq4-act awq3; all by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pythons = {
        "ptqc": sys.executable,
        "llmcompressor": arguments.llmcompressor_python,
        "gptqmodel": arguments.gptqmodel_python,
    }
    model, rows, versions = reference.load(), [], {}
    with tempfile.TemporaryDirectory(prefix="ptqc-") as folder:
        recorded = recordings(model, ("docs", "code"), arguments.text, arguments.windows, folder)
        tokens = f"{folder}/tokens.safetensors"
        save_file({"tokens": torch.cat(reference.calibration("docs", arguments.samples))}, tokens)
        for method, bits, act_order in CASES:
            label = f"{method}{bits}{'-act' if act_order else ''}"
            if arguments.cases and label not in arguments.cases:
                continue
            for side, python in pythons.items():
                case = Case(str(reference.FOLDER), tokens, method, bits, 128, act_order, arguments.threads,
                            f"{folder}/numbers.safetensors", f"{folder}/result.json")  # fmt: skip
                result = run(side, python, case)
                versions |= result.pop("versions", {})
                measured = {} if "failed" in result else scored(model, case, recorded)
                rows.append({"case": label, "side": side} | result | measured)
                print(rows[-1], flush=True)
    floats = {name: each.evaluation.perplexity for name, each in recorded.items()}
    rows = with_ratios(rows, "docs")
    show(rows, list(recorded))
    if arguments.json:
        reference.write(
            arguments.json, rows, float_perplexity=floats, peer_versions=versions, samples=arguments.samples
        )


if __name__ == "__main__":
    main()
