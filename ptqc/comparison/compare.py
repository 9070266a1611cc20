"""Comparison: several methods on copies of one model, each scored against the float model.

The float model's log-probabilities are computed once and kept in a temporary file while the others are scored.
"""

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ptqc.api import quantize
from ptqc.errors import PtqcError
from ptqc.evaluate import Evaluation, LogProbabilities, evaluate, record
from ptqc.qtensor import QuantTensor
from ptqc.recipe import Rule, make_rule
from ptqc.select import Patterns

__all__ = ["Candidate", "Comparison", "LayerError", "OnStep", "Run", "compare", "layer_errors", "parse_candidates"]


@dataclass(frozen=True)
class Candidate:
    """One way to quantize the model; `label` is how the user wrote it."""

    label: str
    method: str
    bits: float | None = None
    group_size: int | None = None
    spec: str | None = None

    @staticmethod
    def parse(text: str) -> "Candidate":
        """Read method[:bits[:group]] or method:spec.

        >>> Candidate.parse("rtn:3:128").group_size
        128

        Raises: PtqcError if the method does not exist or cannot do what is asked.
        """
        method, *rest = text.strip().split(":")
        numbers = [_number(part) for part in rest]
        if len(rest) == 1 and numbers == [None]:
            candidate = Candidate(text.strip(), method, spec=rest[0])
        elif len(rest) > 2 or None in numbers or (len(rest) == 2 and numbers[1] != int(numbers[1] or 0)):
            raise PtqcError(f"{text.strip()!r} is no candidate; write method[:bits[:group]] or method:spec")
        else:
            bits, group = (*numbers, None, None)[:2]
            candidate = Candidate(text.strip(), method, bits, None if group is None else int(group))
        candidate.rule()
        return candidate

    def rule(self) -> Rule:
        """The rule for every weight."""
        return make_rule("*", self.method, bits=self.bits, group_size=self.group_size, spec=self.spec)

    @property
    def is_data_free(self) -> bool:
        """Whether it goes without calibration data."""
        return self.rule().is_data_free


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_candidates(text: str) -> list[Candidate]:
    """Read candidates separated by commas, each once.

    Raises: PtqcError for a candidate that cannot be, or if there are none.
    """
    candidates = [Candidate.parse(part) for part in dict.fromkeys(text.split(",")) if part.strip()]
    if not candidates:
        raise PtqcError("name at least one method to compare, as in rtn:4,hqq:3,nf4")
    return candidates


@dataclass(frozen=True)
class LayerError:
    """How far a stored weight is from the original: the norm of the difference over the norm of the original."""

    name: str
    error: float


@dataclass(frozen=True)
class Run:
    """One row of a comparison.

    bits_per_weight: of the quantized weights, scales included. nbytes: of the whole model.
    """

    label: str
    method: str
    spec: str
    bits_per_weight: float
    nbytes: int
    evaluation: Evaluation
    quantize_seconds: float = 0.0
    layers: tuple[LayerError, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. model, text: as the user named them."""

    model: str
    text: str
    window: int
    windows: int
    baseline: Run
    runs: tuple[Run, ...]


class OnStep(Protocol):
    """Called when a step of a comparison moves on."""

    def __call__(self, label: str, step: str, done: int, total: int) -> None:
        """label: of the candidate. step: "quantize" or "evaluate". done, total: of the units of the step."""
        ...


def compare(
    model: nn.Module,
    candidates: Sequence[Candidate],
    tokens: Tensor,
    *,
    window: int = 512,
    windows: int | None = None,
    batch: int = 4,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    names: tuple[str, str] = ("model", "text"),
    on_step: OnStep | None = None,
    on_quantized: Callable[[Candidate, nn.Module], None] | None = None,
) -> Comparison:
    """Quantize a copy of a float model with each candidate, and score all of them on tokens [tokens].

    The model is unchanged. Weights are quantized as they are stored; scoring on a CPU is in float32, for the float
    model as well. names: of model and text, for the report. on_quantized: sees every quantized copy before it is
    scored, for saving it. The other arguments are those of `quantize` and `evaluate`.

    Raises: PtqcError as `quantize` and `evaluate` do.
    """
    options = {"include": include, "exclude": exclude, "calibration": calibration, "tokenizer": tokenizer}
    keep = on_quantized or _keep_nothing
    step = on_step or _silent
    with tempfile.TemporaryDirectory(prefix="ptqc-") as folder:
        step("float", "evaluate", 0, 1)
        expected = record(
            copy.deepcopy(model).float() if _is_scored_in_float32(model) else model,
            tokens, Path(folder) / "float", window=window, windows=windows, batch=batch,
            on_progress=lambda done, total: step("float", "evaluate", done, total),
        )  # fmt: skip
        runs = [_run(model, candidate, expected, batch, options, step, keep) for candidate in candidates]
    return Comparison(names[0], names[1], window, len(expected.windows), _baseline(model, expected), tuple(runs))


def _silent(label: str, step: str, done: int, total: int) -> None:
    pass


def _keep_nothing(candidate: Candidate, quantized: nn.Module) -> None:
    pass


def _is_scored_in_float32(model: nn.Module) -> bool:
    """Whether arithmetic in the model's own type is slow or coarse: half precision on a CPU."""
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    return any(weight.device.type == "cpu" and weight.dtype != torch.float32 for weight in weights)


def _baseline(model: nn.Module, expected: LogProbabilities) -> Run:
    dtypes = Counter(str(weight.dtype).removeprefix("torch.") for weight in model.parameters() if weight.ndim > 1)
    dtype = dtypes.most_common(1)[0][0] if dtypes else "float32"
    bits = getattr(torch, dtype).itemsize * 8
    return Run("float", "float", dtype, bits, _nbytes(model), expected.evaluation)


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _run(
    model: nn.Module,
    candidate: Candidate,
    expected: LogProbabilities,
    batch: int,
    options: dict[str, Any],
    step: OnStep,
    keep: Callable[[Candidate, nn.Module], None],
) -> Run:
    step(candidate.label, "quantize", 0, 1)
    quantized = copy.deepcopy(model)
    started = time.perf_counter()
    quantize(
        quantized, candidate.method, bits=candidate.bits, group_size=candidate.group_size, spec=candidate.spec,
        progress=False, **options,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    layers = layer_errors(quantized, model)
    spec, bits_per_weight = _storage(quantized)
    nbytes = _nbytes(quantized)
    keep(candidate, quantized)
    evaluation = evaluate(
        quantized.float() if _is_scored_in_float32(quantized) else quantized,
        expected.windows.flatten(), window=expected.windows.shape[1], against=expected, batch=batch,
        on_progress=lambda done, total: step(candidate.label, "evaluate", done, total),
    )  # fmt: skip
    return Run(candidate.label, candidate.method, spec, bits_per_weight, nbytes, evaluation, seconds, layers)


def _storage(model: nn.Module) -> tuple[str, float]:
    """The most frequent spec of the quantized weights, and the bits that one weight takes in the mean."""
    weights = [weight for weight in model.parameters() if isinstance(weight, QuantTensor)]
    spec = Counter(str(weight.spec) for weight in weights).most_common(1)[0][0]
    return spec, 8 * sum(weight.nbytes for weight in weights) / sum(weight.numel() for weight in weights)


def layer_errors(quantized: nn.Module, original: nn.Module) -> tuple[LayerError, ...]:
    """The relative error of every quantized weight, in the order of the model."""
    found = []
    for name, weight in quantized.named_parameters():
        if isinstance(weight, QuantTensor):
            exact = original.get_parameter(name).detach().float()
            difference = float((weight.detach().dequantize().float() - exact).norm())
            norm = float(exact.norm())
            found.append(LayerError(name, difference / norm if norm else difference))
    return tuple(found)
