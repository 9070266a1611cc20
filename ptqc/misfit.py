"""What to tell when a model does not run on the data that it is given: the model's own error, and the likely reason."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ptqc.errors import PtqcError, first_line

__all__ = ["does_not_run", "positions_of", "run_once"]


def run_once(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Run a model on a batch on which something else failed, to learn whose fault it was.

    Raises: PtqcError if it does not run by itself either.
    """
    try:
        with torch.no_grad():
            model(**batch)
    except Exception as error:  # of the model's own code: anything
        raise does_not_run(model, batch, error) from error


def does_not_run(model: nn.Module, batch: Mapping[str, Any], error: Exception) -> PtqcError:
    """An error that names the inputs, what the model raised on them, and token windows that are too long for it."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items()) or "no tensors"
    said = f"the model does not run on its inputs ({given}): {type(error).__name__}: {first_line(error)}"
    positions, tokens = positions_of(model), tensors.get("input_ids")
    if positions is not None and tokens is not None and tokens.shape[-1] > positions:
        said += f"; it has {positions} positions, so use windows of at most {positions} tokens"
    elif isinstance(error, TypeError):
        said += "; give its inputs by the names of the arguments of forward"
    return PtqcError(said)


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a transformers model was made for, None where it does not say."""
    config = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
