"""How much the predictions of a model suffer from a change of one weight: measured, or by second-order expansion.

For stored forms Q of a weight W, E = Q - W, in nats per token on calibration data:

    kl       KL(p || p with Q in the place of W), measured: one forward pass over the data for every form.
    fisher   1/2 E^T F E with F the Fisher information of W: the second-order expansion of the same KL (Kullback 1951,
             section 6). With labels y drawn from the model itself, E^T F E = mean over y of <dL(y)/dW, E>^2 for
             L = -log p(y): one backward pass for each draw, whatever the number of weights and forms.

The square of one draw scatters as widely as its mean. The forms of one weight differ in size rather than in kind, so
E^T F E / |E|^2 is taken to be alike for them and averaged over all: what remains per form is |E|^2, which is known
exactly. (Reference model, hqq at 2 to 8 bits, November 2026: log of kl and fisher correlate with 0.9 per width from 64
draws, at a fifth of the time.)

The inner products are taken for whole windows, so tokens that act through each other are counted; no diagonal or
Kronecker approximation is made. Models without logits are measured by the mean squared change of their output, relative
to its mean square (kl), and by random projections of it instead of drawn labels (fisher).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import log_softmax

from ptqc.errors import PtqcError
from ptqc.qtensor import QuantTensor

__all__ = ["Forms", "OnStep", "by_fisher", "by_kl"]

Batch = Mapping[str, Any]
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Forms:
    """The stored forms of one weight. parameter: the weight, by its name in the model."""

    name: str
    parameter: nn.Parameter
    stored: Sequence[QuantTensor]

    def numbers(self, form: QuantTensor) -> Tensor:
        """What a stored form stands for, like the weight."""
        return form.dequantize().to(self.parameter.dtype)


@torch.no_grad()
def by_kl(
    model: nn.Module, forms: Sequence[Forms], batches: Sequence[Batch], on_step: OnStep = lambda done, total: None
) -> list[list[float]]:
    """The loss of every form of every weight, each alone in the float model, in nats per token."""
    expected = [_scores(model(**batch)) for batch in batches]
    found: list[list[float]] = []
    total = sum(len(weight.stored) for weight in forms)
    for weight in forms:
        losses = []
        for form in weight.stored:
            changed = {weight.name: weight.numbers(form)}
            outputs = (_scores(functional_call(model, changed, (), dict(batch))) for batch in batches)
            pairs = zip(expected, outputs, strict=True)
            losses.append(sum(_divergence(before, after) for before, after in pairs) / len(batches))
            on_step(sum(map(len, found)) + len(losses), total)
        found.append(losses)
    return found


def by_fisher(
    model: nn.Module,
    forms: Sequence[Forms],
    batches: Sequence[Batch],
    *,
    draws: int = 1,
    seed: int = 0,
    on_step: OnStep = lambda done, total: None,
) -> list[list[float]]:
    """The second-order loss of every form of every weight, in nats per token. draws: of labels for each batch."""
    sums = [torch.zeros(len(weight.stored), dtype=torch.float64) for weight in forms]
    parameters = [weight.parameter for weight in forms]
    trained = [parameter.requires_grad for parameter in parameters]
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for number, batch in enumerate(batches):
            with torch.enable_grad():
                scores = _scores(model(**batch))
                for draw in range(draws):
                    loss = _drawn_loss(scores, generator)
                    gradients = _gradients(loss, parameters, is_last=draw + 1 == draws)
                    _add_squares(sums, forms, gradients)
            tokens += draws * scores.tokens
            on_step(number + 1, len(batches))
    finally:
        for parameter, is_trained in zip(parameters, trained, strict=True):
            parameter.requires_grad_(is_trained)
    return [_pooled(0.5 * total / tokens, weight) for total, weight in zip(sums, forms, strict=True)]


def _pooled(losses: Tensor, weight: Forms) -> list[float]:
    """Losses [forms] as one sensitivity times the squared error of each form."""
    exact = weight.parameter.detach().double()
    errors = torch.stack([(weight.numbers(form).double() - exact).square().sum() for form in weight.stored]).cpu()
    known = errors > 0
    sensitivity = (losses[known] / errors[known]).mean() if known.any() else torch.zeros(())
    pooled: list[float] = (sensitivity * errors).tolist()
    return pooled


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter], is_last: bool) -> Sequence[Tensor | None]:
    """The gradient of every parameter, None for those that the loss does not depend on."""
    if not loss.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(loss, parameters, retain_graph=not is_last, allow_unused=True)


def _add_squares(sums: Sequence[Tensor], forms: Sequence[Forms], gradients: Sequence[Tensor | None]) -> None:
    for total, weight, gradient in zip(sums, forms, gradients, strict=True):
        if gradient is None:  # the batch did not reach it
            continue
        at_weight = torch.sum(gradient * weight.parameter.detach(), dtype=torch.float64)
        for position, form in enumerate(weight.stored):
            at_form = torch.sum(gradient * weight.numbers(form), dtype=torch.float64)
            total[position] += float(at_form - at_weight) ** 2


# -------------------------------------------------------------------- outputs


@dataclass(frozen=True)
class _Scores:
    """What a model says: logits [..., classes] float32, or another first output [..., features]."""

    values: Tensor
    is_logits: bool

    @property
    def tokens(self) -> int:
        """Distributions there are."""
        return self.values.numel() // self.values.shape[-1]


def _scores(output: Any) -> _Scores:
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return _Scores(logits.float(), True)
    first = output
    while not isinstance(first, Tensor):
        values = list(first.values()) if isinstance(first, Mapping) else first
        if not isinstance(values, (list, tuple)) or not values:
            raise PtqcError(f"the output of the model ({type(output).__name__}) holds no tensor to compare")
        first = values[0]
    return _Scores(first.float(), False)


def _divergence(before: _Scores, after: _Scores) -> float:
    if before.is_logits:
        expected = log_softmax(before.values, -1)
        return float((expected.exp() * (expected - log_softmax(after.values, -1))).sum(-1).double().mean())
    change = (after.values - before.values).double().square().mean()
    return float(change / before.values.double().square().mean().clamp_min(1e-300))


def _drawn_loss(scores: _Scores, generator: torch.Generator) -> Tensor:
    """-log p of labels drawn from the model, summed over all tokens; the noise does not depend on the device."""
    if not scores.is_logits:
        weights = torch.randn(scores.values.shape, generator=generator).to(scores.values.device)
        return (scores.values * weights).sum() / scores.values.detach().square().mean().sqrt().clamp_min(1e-30)
    logs = log_softmax(scores.values.reshape(-1, scores.values.shape[-1]), -1)
    noise = -torch.rand(logs.shape, generator=generator).clamp_min(1e-30).log()  # exponential: Gumbel's trick
    labels = (logs.detach() - noise.to(logs.device).log()).argmax(-1)
    return -logs.gather(-1, labels[:, None]).sum()
