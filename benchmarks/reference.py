"""The reference model with texts to calibrate and to score on, the same for every benchmark that measures quality.

English is the language reference of the running Python, code a selection of its standard library. Calibration draws
from the first 70% of a text's tokens, scoring from the rest.
"""

import copy
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptqc
from ptqc.evaluate import evaluate, record
from ptqc.texts import EMBEDDED, tokenize

FOLDER = Path(__file__).parent / "models" / "reference"
WINDOW = 512
_SHARE = 0.7


def load():
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def tokens(text):
    """Tokens to calibrate on and tokens to score, of "docs" or "code"."""
    ids = tokenize(EMBEDDED[text](), AutoTokenizer.from_pretrained(FOLDER))
    cut = int(_SHARE * len(ids)) // WINDOW * WINDOW
    return ids[:cut], ids[cut:]


def calibration(text, windows=64, seed=0):
    """Windows [1, 512] of the part for calibration, drawn at random without overlap."""
    ids = tokens(text)[0]
    rows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:windows]
    return [row[None] for row in rows[chosen.sort().values]]


class Scale:
    """Scores quantized copies of a float model on texts against that model; its log-probabilities are kept on disk."""

    def __init__(self, model, texts=("docs",), windows=32):
        self.model, self.windows = model, windows
        self._folder = tempfile.TemporaryDirectory(prefix="ptqc-")
        self.recorded = {
            text: record(model, tokens(text)[1], Path(self._folder.name) / text, window=WINDOW, windows=windows)
            for text in texts
        }

    def perplexity(self, text="docs"):
        """Of the float model."""
        return self.recorded[text].evaluation.perplexity

    def score(self, model, text="docs"):
        """Perplexity and KL to the float model."""
        expected = self.recorded[text]
        found = evaluate(model, expected.windows.flatten(), window=WINDOW, against=expected)
        return {"perplexity": found.perplexity, "kl": found.kl}

    def quantized(self, method, **options):
        """A quantized copy and the seconds it took."""
        model = copy.deepcopy(self.model)
        started = time.perf_counter()
        ptqc.quantize(model, method, progress=False, **options)
        return model, time.perf_counter() - started


def bits_of(model):
    """Mean bits of a quantized weight, everything included."""
    stored = [weight for weight in model.parameters() if isinstance(weight, ptqc.QuantTensor)]
    return 8 * sum(weight.nbytes for weight in stored) / sum(weight.numel() for weight in stored)


def write(path, rows, **more):
    """Write rows with versions, machine and date."""
    versions = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    path.write_text(json.dumps({"rows": rows, "versions": versions} | machine | more, indent=1) + "\n")
