"""Proofs of folds by numbers: a piece, or a whole model, run in float64 with the parameters before and after."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptqc.engine.pieces import Piece
from ptqc.engine.work import Check
from ptqc.passes.groups.check import Float64, change, eager_outputs, widened

__all__ = ["model_check", "piece_check"]


def piece_check(
    piece: Piece, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], batch: Mapping[str, Any]
) -> Check:
    """Compares everything that a piece gives and returns. values, batch: its inputs. parameters: all it reads."""

    def run(changed: Mapping[str, Tensor]) -> Sequence[Tensor]:
        arguments = piece.arguments(values, {**parameters, **changed}, batch)
        with torch.no_grad(), Float64():
            made = piece.program.module(*(widened(argument) for argument in arguments))
        return [value for value in made if isinstance(value, Tensor) and value.is_floating_point()]

    return lambda before, after: change(run(before), run(after))


def model_check(model: nn.Module, batch: Mapping[str, Any]) -> Check:
    """Compares the outputs of a copy of the model in float64, run eagerly: what capture did not see is covered too."""
    wide = copy.deepcopy(model).double()
    inputs = {name: widened(value) for name, value in batch.items()}
    parameters = dict(wide.named_parameters(remove_duplicate=False))

    def run(changed: Mapping[str, Tensor]) -> Sequence[Tensor]:
        for name, value in changed.items():
            parameters[name].data.copy_(value)
        return eager_outputs(wide, inputs)

    return lambda before, after: change(run(before), run(after))
