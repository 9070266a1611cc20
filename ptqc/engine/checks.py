"""Proofs of folds by numbers: a piece, run in float64 with the parameters before and after."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ptqc.engine.pieces import Piece
from ptqc.engine.work import Check
from ptqc.passes.groups.check import Float64, change, widened

__all__ = ["piece_check"]


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
