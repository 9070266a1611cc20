"""The main job on the reference model, from a float checkpoint to files that run elsewhere: what `make demo` shows.

    python -m benchmarks.demo [--out out/demo] [--windows 24] [--methods hqq:4,nf4,...]

Quantizes with several methods, scores each against the float model, saves and reloads, compiles, exports, and ends
with a table and a page. Needs no network. Exits with 1 if a check fails.
"""

import argparse
import copy
import io
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import ptqc
from ptqc.comparison.compare import Candidate, Comparison, compare, parse_candidates
from ptqc.comparison.report import check_folder, write
from ptqc.texts import docs, tokenize

REFERENCE = Path(__file__).parent / "models" / "reference"
METHODS = "int8,fp8,hqq:4,nf4,nf4:nf4g64dq,fp4,rtn:4,hqq:3,rtn:3,hqq:2,gptq:4,awq:4,awq+gptq:3"
WINDOW = 512
_SAMPLES = 16
"""Windows to calibrate on."""
PROMPT = "The for statement is used to"

console = Console(highlight=False)


@dataclass
class Demo:
    """What the steps share. tokens: to score. calibration: the windows that follow, [1, 512] each. probe: tokens whose
    logits are compared. logits, folder_bytes: by label of the method."""

    out: Path
    model: nn.Module
    tokenizer: Any
    tokens: Tensor
    calibration: list[Tensor]
    candidates: list[Candidate]
    logits: dict[str, Tensor] = field(default_factory=dict)
    folder_bytes: dict[str, int] = field(default_factory=dict)
    checks: list[bool] = field(default_factory=list)

    @property
    def probe(self) -> Tensor:
        """Some tokens, [1, 64]."""
        return self.tokens[None, :64]

    def folder(self, label: str) -> Path:
        """Where the model quantized as `label` is saved."""
        return self.out / "models" / label.replace(":", "-")

    def check(self, holds: bool, what: str) -> None:
        """Note whether something holds, and show it."""
        self.checks.append(holds)
        console.print(f"  {'[green]ok[/]' if holds else '[red]FAILED[/]'}  {what}", soft_wrap=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Show the title of a part of the demo, and the time it took."""
    console.print(f"\n[bold]{title}[/]", soft_wrap=True)
    started = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - started:.1f} s[/]")


def main() -> int:
    """Run the demo; returns the exit code."""
    started = time.perf_counter()
    demo = prepare()
    chosen = next((c for c in demo.candidates if c.method == "hqq"), demo.candidates[0])
    with step("1  Quantize: each method on a copy, scored against the float model"):
        comparison = run_methods(demo)
    with step("2  Save and load"):
        reload_all(demo)
    with step(f'3  Compile the float model: torch.compile(model, backend="ptqc", options={options_of(chosen)})'):
        compile_float(demo, chosen)
    with step("4  Export"):
        export_files(demo, chosen)
    with step(f"5  Generate with {chosen.label}"):
        generate(demo, chosen)
    write(comparison, demo.out, overwrite=True)
    console.print(result_table(demo, comparison))
    console.print(f"{sum(demo.checks)} of {len(demo.checks)} checks hold, {time.perf_counter() - started:.0f} s in all")
    console.print(f"Picture, sortable table and the error of every layer: [bold]{demo.out / 'index.html'}[/]")
    return 0 if all(demo.checks) else 1


def prepare() -> Demo:
    """Read the command line, load the model and the text."""
    parser = argparse.ArgumentParser(description="Quantize, compile, evaluate and export the reference model.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--windows", type=int, default=24, help="windows of 512 tokens to score")
    parser.add_argument("--methods", default=METHODS)
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    console.rule("[bold]ptqc demo[/]", align="left")
    candidates = parse_candidates(arguments.methods)
    check_folder(arguments.out, overwrite=True)
    shutil.rmtree(arguments.out / "models", ignore_errors=True)
    model = ptqc.load(REFERENCE)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokens = tokenize(docs(), tokenizer, limit=(arguments.windows + _SAMPLES) * WINDOW)
    tokens, unseen = tokens[: arguments.windows * WINDOW], tokens[arguments.windows * WINDOW :]
    calibration = [unseen[start : start + WINDOW][None] for start in range(0, len(unseen), WINDOW)]
    weights = sum(weight.numel() for weight in model.parameters())
    console.print(
        f"{type(model).__name__}, {weights / 1e6:.1f} M weights in float16, {REFERENCE}\n"
        f"{len(tokens):,} tokens of Python's language reference to score, the next {unseen.numel():,} to calibrate on, "
        f"{len(candidates)} methods, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        soft_wrap=True,
    )
    return Demo(arguments.out, model, tokenizer, tokens, calibration, candidates)


def run_methods(demo: Demo) -> Comparison:
    """Quantize with every method; save each model and keep its logits on the probe."""
    labels = ["float", *(candidate.label for candidate in demo.candidates)]
    windows = len(demo.tokens) // WINDOW

    def keep(candidate: Candidate, quantized: nn.Module) -> None:
        demo.logits[candidate.label] = logits(quantized, demo.probe)
        ptqc.save(quantized, demo.folder(candidate.label), tokenizer=demo.tokenizer)

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("windows"), TimeRemainingColumn(), TextColumn("left"))
    with Progress(TextColumn("  {task.description:<24}"), *columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=windows * len(labels))

        def advance(label: str, step: str, done: int, total: int) -> None:
            bar.update(task, description=f"{step} {label}", completed=labels.index(label) * windows + done)
            if step == "evaluate" and done == total:
                done_so_far = "scored" if label == "float" else "quantized, saved, scored"
                bar.console.print(f"  {label:<14} {done_so_far}", style="dim")

        found = compare(
            demo.model, demo.candidates, demo.tokens, window=WINDOW, names=(REFERENCE.name, "docs"), on_step=advance,
            on_quantized=keep, calibration=demo.calibration,
        )  # fmt: skip
    return found


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [1, tokens, vocabulary]."""
    found: Tensor = model(tokens).logits
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def reload_all(demo: Demo) -> None:
    """Load every saved model, through both doors."""
    for door, load in {"ptqc.load": ptqc.load, "from_pretrained": AutoModelForCausalLM.from_pretrained}.items():
        same = [torch.equal(logits(load(demo.folder(label)), demo.probe), demo.logits[label]) for label in demo.logits]
        demo.check(all(same), f"{door}: {sum(same)} of {len(same)} models give the same logits, bit for bit")
    for label in demo.logits:
        demo.folder_bytes[label] = sum(file.stat().st_size for file in demo.folder(label).glob("*.safetensors"))


def options_of(candidate: Candidate) -> dict[str, Any]:
    """A candidate as options of the backend."""
    bits = candidate.bits
    if bits is not None and bits == int(bits):
        bits = int(bits)
    options = {"bits": bits, "group_size": candidate.group_size, "spec": candidate.spec}
    given = {name: value for name, value in options.items() if value is not None}
    return {"method": candidate.method, **given, "exact": True}  # activations stay float, as in the eager model


def compile_float(demo: Demo, candidate: Candidate) -> None:
    """Quantize inside the backend, and hold the result against the model that `ptqc.quantize` made."""
    expected = logits(ptqc.load(demo.folder(candidate.label), dtype=torch.float32), demo.probe)
    compiled = torch.compile(copy.deepcopy(demo.model).float(), backend="ptqc", options=options_of(candidate))
    started = time.perf_counter()
    with console.status("compiling"):
        found = logits(compiled, demo.probe)
    seconds = time.perf_counter() - started
    distance = difference(found, expected)
    demo.check(distance < 1e-3, f"compiled in {seconds:.1f} s; agrees with the eager quantized model to {distance:.1e}")


def export_files(demo: Demo, candidate: Candidate) -> None:
    """Write GGUF from the float model and ONNX from a quantized one, and read them with other programs."""
    expected = logits(copy.deepcopy(demo.model).float(), demo.probe)
    for quant, allowed in (("Q8_0", 0.03), ("Q4_0", 0.3)):
        path = demo.out / f"reference-{quant}.gguf"
        with console.status(f"writing {path.name}"), redirect_stderr(io.StringIO()):  # transformers' bar stays out
            report = ptqc.export(demo.model, "gguf", path, quant=quant, tokenizer=str(REFERENCE))
            loaded = AutoModelForCausalLM.from_pretrained(demo.out, gguf_file=path.name, dtype=torch.float32)
        distance = difference(logits(loaded, demo.probe), expected)
        read = f"transformers reads it, logits {distance:.1e} from float"
        demo.check(distance < allowed, f"{path}, {report.nbytes / 1e6:.1f} MB; {read}")
    path = demo.out / f"reference-{candidate.label.replace(':', '-')}.onnx"
    quantized = ptqc.load(demo.folder(candidate.label), dtype=torch.float32)
    with console.status(f"writing {path.name}"):
        report = ptqc.export(quantized, "onnx", path)
    written = f"{path}, {report.nbytes / 1e6:.1f} MB"
    if find_spec("onnxruntime") is None:
        demo.check(True, f"{written}; onnxruntime is not installed to run it")
        return
    distance = difference(run_onnx(path, demo.probe), logits(quantized, demo.probe))
    demo.check(distance < 1e-3, f"{written}; ONNX Runtime agrees to {distance:.1e}")


def run_onnx(path: Path, tokens: Tensor) -> Tensor:
    """Logits that ONNX Runtime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):  # nothing has been read before
            inputs[entry.name] = torch.zeros(1, entry.shape[1], 0, entry.shape[3]).numpy()
    return torch.from_numpy(session.run(["logits"], inputs)[0])


def generate(demo: Demo, candidate: Candidate) -> None:
    """Continue a sentence."""
    model: Any = ptqc.load(demo.folder(candidate.label), dtype=torch.float32)
    inputs = demo.tokenizer(PROMPT, return_tensors="pt")
    with console.status("generating"):
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=demo.tokenizer.eos_token_id)[0]
    console.print(f"  [italic]{' '.join(demo.tokenizer.decode(ids, skip_special_tokens=True).split())}[/]")


def result_table(demo: Demo, comparison: Comparison) -> Table:
    """The rows of the comparison, with the size of each saved folder and the seconds that quantizing took."""
    explained = "bits: of a weight, scales included  MB: the saved folder  KL: nats per token from the float model"
    table = Table(box=box.SIMPLE_HEAD, caption=f"{explained}  top-1: same most likely token  s: quantizing")
    for head in ("method", "format"):
        table.add_column(head, no_wrap=True)
    for head in ("bits", "MB", "perplexity", "KL", "top-1", "s"):
        table.add_column(head, justify="right", no_wrap=True)
    float_bytes = (REFERENCE / "model.safetensors").stat().st_size
    baseline = comparison.baseline
    perplexity = f"{baseline.evaluation.perplexity:.3f}"
    table.add_row("float", baseline.spec, "16", f"{float_bytes / 1e6:.1f}", perplexity, "-", "-", "-", style="dim")
    for run in comparison.runs:
        found = run.evaluation
        table.add_row(
            run.label, run.spec, f"{run.bits_per_weight:.3f}", f"{demo.folder_bytes[run.label] / 1e6:.1f}",
            f"{found.perplexity:.3f}", f"{found.kl:.5f}", f"{100 * (found.top1 or 0):.1f}%",
            f"{run.quantize_seconds:.1f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    sys.exit(main())
