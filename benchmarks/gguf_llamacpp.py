"""Does llama.cpp read our GGUF files as we mean them? Perplexity of one text, by llama.cpp and by PyTorch.

The reference model is exported in every type and mix, and quantized to int4g32 and int8g32 and carried over. Each file
is run by llama.cpp (package llama-cpp-python) on non-overlapping windows of 512 tokens of the Python language
reference. "PyTorch" is the same architecture in float32, holding the numbers that the `gguf` package decodes from the
file. With --importance, scales are searched with the importance that calibration text gives.

    python -m benchmarks.gguf_llamacpp [--quants Q4_0 Q4_K_M] [--windows 24] [--importance] [--json gguf_llamacpp.json]

--json adds its rows to those the file already has.
"""

import argparse
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import gguf
import llama_cpp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from ptqc.channel_importance import importance
from ptqc.codegen.export._gguf_architectures import architecture_of
from ptqc.codegen.export._gguf_mixes import MIXES
from ptqc.codegen.export._gguf_placement import placements
from ptqc.codegen.exporters import export
from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec

REFERENCE = Path(__file__).parent / "models" / "reference"
WINDOW = 512
Logits = Callable[[list[int]], Tensor]


def load_reference() -> nn.Module:
    """The reference model in float32."""
    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()


def quantized(model: nn.Module, spec: str) -> nn.Module:
    """The model with every linear of its blocks rounded to `spec`, in place."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            stored = quantize_weight(module.weight, METHODS.get("rtn")(), WeightSpec.parse(spec), name=name)
            module.weight = nn.Parameter(stored, requires_grad=False)
    return model


def decoded(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The numbers in a file as the `gguf` package decodes them, by the names of the model, rows in its order."""
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for at in placements(architecture_of(model), model):
        tensor = read[at.stored_name]
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        numbers = numbers.reshape(at.weight.shape)
        weights[at.name] = numbers if at.rows is None else torch.empty_like(numbers).index_copy_(0, at.rows, numbers)
    return weights


def windows(count: int) -> tuple[str, list[list[int]]]:
    """The text, and its first `count` windows of tokens."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = AutoTokenizer.from_pretrained(REFERENCE)(text, add_special_tokens=False).input_ids
    return text, [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]


def perplexity(logits_of: Logits, batches: list[list[int]]) -> float:
    """exp of the mean negative log likelihood of every token but the first of each window."""
    losses = [cross_entropy(logits_of(ids)[:-1].double(), torch.tensor(ids[1:])) for ids in batches]
    return float(torch.stack(losses).mean().exp())


def by_llama(path: Path) -> Logits:
    """llama.cpp's logits of one window, [tokens, vocabulary]."""
    runner = llama_cpp.Llama(str(path), n_ctx=WINDOW, logits_all=True, n_threads=2, n_threads_batch=2, verbose=False)

    def logits(ids: list[int]) -> Tensor:
        runner.reset()
        runner.eval(ids)
        return torch.from_numpy(runner.scores[: len(ids)].copy())

    return logits


def by_torch(model: nn.Module) -> Logits:
    """PyTorch's logits of one window, [tokens, vocabulary]."""

    def logits(ids: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0]

    return logits


def tokens_differ(path: Path, text: str) -> int:
    """How many of the ids that llama.cpp's own tokenizer gives the text differ from the Hugging Face tokenizer's."""
    vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ours = AutoTokenizer.from_pretrained(REFERENCE)(text, add_special_tokens=False).input_ids
    theirs = vocabulary.tokenize(text.encode(), add_bos=False, special=True)
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def compare(
    label: str,
    model: nn.Module,
    quant: str,
    batches: list[list[int]],
    text: str,
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, object]:
    """Export, run both, and say what became of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        report = export(model, "gguf", path, quant=quant, tokenizer=REFERENCE, importance=importance)
        weights = decoded(path, model)
        held = {
            name: weight.dequantize() for name, weight in model.named_parameters() if isinstance(weight, QuantTensor)
        }
        exact = sum(torch.equal(weights[name], weight) for name, weight in held.items())
        twin = load_reference()
        twin.load_state_dict(weights)
        theirs, ours = perplexity(by_llama(path), batches), perplexity(by_torch(twin), batches)
        return {
            "file": label,
            "bytes": report.nbytes,
            "fates": {
                fate: sum(t.fate == fate for t in report.tensors) for fate in ("lossless", "converted", "requantized")
            },
            "llama.cpp": theirs,
            "pytorch": ours,
            "difference": theirs / ours - 1,
            "bit_exact": f"{exact}/{len(held)}" if held else "",
            "tokens_differ": tokens_differ(path, text),
        }


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--quants", nargs="*", default=list(MIXES))
    parser.add_argument("--importance", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("gguf").setLevel(logging.ERROR)
    disable_progress_bar()
    text, batches = windows(arguments.windows)
    counts, mark = None, ""
    if arguments.importance:
        counts = importance(load_reference(), "docs", AutoTokenizer.from_pretrained(REFERENCE), samples=32)
        mark = " importance"
    jobs = [(quant + mark, quant, None) for quant in arguments.quants]
    if counts is None:
        carried = (("int4g32", "Q4_0"), ("int8g32", "Q8_0"))
        jobs += [(f"{spec} -> {quant}", quant, spec) for spec, quant in carried if quant in arguments.quants]
    print(f"{'file':18} {'MB':>6} {'llama.cpp':>10} {'PyTorch':>10} {'difference':>10}  bit-exact  ids that differ")
    for label, quant, spec in jobs:
        model = load_reference() if spec is None else quantized(load_reference(), spec)
        row = compare(label, model, quant, batches, text, counts)
        print(
            f"{row['file']:18} {row['bytes'] / 1e6:6.2f} {row['llama.cpp']:10.4f} {row['pytorch']:10.4f} "
            f"{row['difference']:+10.3%}  {row['bit_exact']:9}  {row['tokens_differ']}",
            flush=True,
        )
        if arguments.json:
            _keep(arguments.json, row)


def _keep(path: Path, row: dict[str, object]) -> None:
    """Add a row to the file, in the place of one of that name."""
    machine = {"machine": platform.platform(), "torch": torch.__version__, "llama_cpp": llama_cpp.__version__}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [old for old in before if old["file"] != row["file"]] + [row]
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
