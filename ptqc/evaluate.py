"""Evaluation of a causal language model: perplexity, and how far its predictions are from those of the float model.

The text is cut into windows that do not overlap; each is scored on its own, the first token of a window excepted (it
has no context). Tokens that do not fill the last window are not scored. All arithmetic on logits is in float32.

    perplexity   exp of the mean negative log-likelihood of the next token
    kl           mean over positions of KL(float || model), in nats: what quantization changed, whatever the text
    top1         share of positions where both find the same token most likely
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptqc.errors import PtqcError
from ptqc.misfit import does_not_run, positions_of

__all__ = ["Evaluation", "LogProbabilities", "evaluate", "record", "windows_of"]

log = logging.getLogger("ptqc")

_LOGITS_AT_ONCE = 1 << 24
"""Logits normalised at a time: bounds each float32 temporary to 64 MB."""

OnProgress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. kl and top1 are None where nothing was compared."""

    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int
    """Tokens scored."""
    seconds: float


@dataclass(frozen=True)
class LogProbabilities:
    """The log-probabilities of a model on the windows of a text, [windows, window - 1, vocabulary] float32 in a file.

    windows: the token ids they belong to, [windows, window]. evaluation: the model's own.
    """

    path: Path
    windows: Tensor
    vocabulary: int
    evaluation: Evaluation

    def at(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count` of the windows, [count * (window - 1), vocabulary]."""
        positions = self.windows.shape[1] - 1
        shape = (len(self.windows), positions, self.vocabulary)
        rows = np.memmap(self.path, np.float32, "r", shape=shape)[first : first + count]
        return torch.from_numpy(np.array(rows)).flatten(0, 1)


def windows_of(tokens: Tensor, window: int = 512, windows: int | None = None) -> Tensor:
    """Cut tokens [tokens] into [windows, window], at most `windows` of them (None: all that are full).

    Raises: PtqcError if they do not fill one, saying how many it takes.
    """
    flat = tokens.flatten()
    if window < 2:
        raise PtqcError(f"a window must have at least 2 tokens (one of context), not {window}")
    if windows is not None and windows < 1:
        raise PtqcError(f"at least one window must be scored, not {windows}")
    if len(flat) < window:
        raise PtqcError(f"the text has {len(flat)} tokens, a window takes {window}; give more text or a smaller window")
    count = min(len(flat) // window, windows or len(flat))
    return flat[: count * window].view(count, window)


def evaluate(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int = 512,
    windows: int | None = None,
    against: nn.Module | LogProbabilities | None = None,
    batch: int = 4,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Score a model on tokens [tokens], at most `windows` windows of `window` tokens.

    against: the float model, run beside this one batch for batch, or what `record` kept of it. batch: windows in one
    forward pass.

    Raises: PtqcError for a text shorter than a window, a model without logits, or two models that do not compare.
    """
    cut = windows_of(tokens, window, windows)
    if isinstance(against, LogProbabilities) and not torch.equal(against.windows, cut.cpu()):
        raise PtqcError("the recorded log-probabilities belong to other windows; record them again for this text")
    positions = positions_of(model)
    if positions is not None and cut.shape[1] > positions:
        log.warning("windows of %d tokens are longer than the %d positions of the model", cut.shape[1], positions)
    started = time.perf_counter()
    sums = _Sums()
    with _scoring(model), _scoring(against):
        for first in range(0, len(cut), batch):
            part = cut[first : first + batch]
            _score(model, part, _expected(against, part, first), sums)
            _report(on_progress, first + len(part), len(cut))
    return sums.evaluation(time.perf_counter() - started, is_compared=against is not None)


def record(
    model: nn.Module,
    tokens: Tensor,
    path: str | Path,
    *,
    window: int = 512,
    windows: int | None = None,
    batch: int = 4,
    on_progress: OnProgress | None = None,
) -> LogProbabilities:
    """Evaluate a model and keep its log-probabilities in the file `path`, for `against` of several others.

    The caller removes the file; it takes windows x (window - 1) x vocabulary x 4 bytes.

    Raises: PtqcError as `evaluate` does, and if the disk has no room for the file.
    """
    cut = windows_of(tokens, window, windows)
    path = Path(path)
    started = time.perf_counter()
    sums = _Sums()
    vocabulary = 0
    with path.open("wb") as file, _scoring(model):
        for first in range(0, len(cut), batch):
            part = cut[first : first + batch]
            logits = _logits(model, part)
            if first == 0:
                vocabulary = logits.shape[-1]
                _check_room(path, len(cut), window, vocabulary)
            for rows in _score_logits(logits, part, None, sums):
                rows.cpu().numpy().tofile(file)
            _report(on_progress, first + len(part), len(cut))
    evaluation = sums.evaluation(time.perf_counter() - started, is_compared=False)
    return LogProbabilities(path, cut.cpu(), vocabulary, evaluation)


def _check_room(path: Path, windows: int, window: int, vocabulary: int) -> None:
    each = (window - 1) * vocabulary * 4
    free = shutil.disk_usage(path.parent).free
    if windows * each > free:
        raise PtqcError(
            f"{windows} windows of log-probabilities take {windows * each / 1e9:.1f} GB, {path.parent} has "
            f"{free / 1e9:.1f} GB; evaluate at most {free // each} windows, or set TMPDIR to another disk"
        )


@dataclass
class _Sums:
    """What is added up over positions, in float64."""

    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0
    tokens: int = 0

    def evaluation(self, seconds: float, *, is_compared: bool) -> Evaluation:
        mean = self.loss / self.tokens
        perplexity = math.exp(mean) if mean < 700 else math.inf
        if not is_compared:
            return Evaluation(perplexity, None, None, self.tokens, seconds)
        return Evaluation(perplexity, self.divergence / self.tokens, self.same / self.tokens, self.tokens, seconds)


@contextmanager
def _scoring(model: object) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and back; anything else is left alone."""
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)


def _logits(model: nn.Module, part: Tensor) -> Tensor:
    """Logits of all positions but the last, [windows, window - 1, vocabulary]."""
    device = next((parameter.device for parameter in model.parameters()), part.device)
    try:
        output = model(part.to(device))
    except Exception as error:  # of the model's own code: anything
        raise does_not_run(model, {"input_ids": part}, error) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != part.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise PtqcError(
            f"{type(model).__name__} gives no logits [windows, window, vocabulary] for token ids (found: {found}); "
            "only causal language models can be evaluated"
        )
    return logits[:, :-1]


def _expected(against: nn.Module | LogProbabilities | None, part: Tensor, first: int) -> Tensor | None:
    if isinstance(against, LogProbabilities):
        return against.at(first, len(part))
    return None if against is None else _logits(against, part).flatten(0, 1)


def _score(model: nn.Module, part: Tensor, expected: Tensor | None, sums: _Sums) -> None:
    for _ in _score_logits(_logits(model, part), part, expected, sums):
        pass


def _score_logits(logits: Tensor, part: Tensor, expected: Tensor | None, sums: _Sums) -> Iterator[Tensor]:
    """Add the positions of some windows to the sums; yields their log-probabilities a chunk at a time."""
    rows, targets = logits.flatten(0, 1), part[:, 1:].flatten().to(logits.device)
    if expected is not None and expected.shape != rows.shape:
        raise PtqcError(
            f"the models have vocabularies of {rows.shape[-1]} and {expected.shape[-1]}; only one vocabulary compares"
        )
    chunk = max(1, _LOGITS_AT_ONCE // rows.shape[-1])
    for first in range(0, len(rows), chunk):
        here = slice(first, first + chunk)
        found = rows[here].float().log_softmax(-1)
        sums.loss -= float(found.gather(1, targets[here, None]).double().sum())
        sums.tokens += len(found)
        if expected is not None:
            # A second log_softmax of recorded log-probabilities changes nothing: they are normalised.
            wanted = expected[here].to(found.device).float().log_softmax(-1)
            # A token that the float model excludes (-inf) adds nothing, where 0 * (-inf + inf) would be NaN.
            terms = torch.where(wanted.isneginf(), 0.0, wanted.exp() * (wanted - found))
            sums.divergence += float(terms.sum(-1).double().sum())
            sums.same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        yield found


def _report(on_progress: OnProgress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)
