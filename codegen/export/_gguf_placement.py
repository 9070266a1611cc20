"""Where each weight of a model goes in a GGUF file, and its values in the order of the file, a band of rows at a time.

A tensor of the file is some rows of a parameter seen as a matrix [all other axes, in]: all of them, in another order
for the rotated projections, or half of every expert where gates and ups lie in one parameter. Names come from the table
of the `gguf` package; packed experts, for which it knows the names of another time, from `_PACKED`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_TENSOR
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptqc.codegen.export._gguf_family import Architecture
from ptqc.codegen.export._gguf_rotary import rotary_factors
from ptqc.codegen.exporters import ReadRows
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor

__all__ = ["Placement", "placements", "rows_in"]

_PACKED: Mapping[str, tuple[MODEL_TENSOR, ...]] = {
    "experts.gate_up_proj": (MODEL_TENSOR.FFN_GATE_EXP, MODEL_TENSOR.FFN_UP_EXP),
    "experts.up_proj": (MODEL_TENSOR.FFN_UP_EXP,),
    "experts.down_proj": (MODEL_TENSOR.FFN_DOWN_EXP,),
}
"""Parameters [experts, out, in] by the end of their name, and the tensors that share their rows."""

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Placement:
    """A tensor of the file and the parameter that it is, or is a part of.

    name: of the parameter; stored_name: of the tensor; role: which tensor it is. weight: the parameter, perhaps without
    values; a stored one as a matrix where it can be one. shape: of the tensor. read: gives rows of float parameters.
    rows: for every row of the tensor its row in the parameter as a matrix, or None; of a vector its numbers.
    is_transposed: the parameter is [..., in, out]. offset: what the file adds to its numbers.
    """

    name: str
    stored_name: str
    role: MODEL_TENSOR
    weight: Tensor
    shape: tuple[int, ...]
    read: ReadRows
    rows: Tensor | None = None
    is_transposed: bool = False
    offset: float = 0.0

    @property
    def layer(self) -> int:
        """The layer that the tensor belongs to; 0 for those outside of layers."""
        parts = self.stored_name.split(".")
        return int(parts[1]) if parts[0] == "blk" else 0

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[all other axes, in]."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def is_read_whole(self) -> bool:
        """Whether a band takes no less memory than everything."""
        return self.is_transposed or isinstance(self.weight, QuantTensor)

    def band(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor as a matrix; a stored weight stays one."""
        if self.is_read_whole:
            whole = self._whole()
            return whole[start:stop] if self.rows is None else whole.index_select(0, self.rows[start:stop])
        if self.rows is None:
            found = self.read(self.name, start, stop)
        elif len(self.shape) == 1:  # the biases of rows
            found = self.read(self.name, start, stop).index_select(1, self.rows)
        else:  # they lie close together, so what lies between them is read along
            wanted = self.rows[start:stop]
            first, last = int(wanted.min()), int(wanted.max())
            found = self.read(self.name, first, last + 1).index_select(0, wanted - first)
        return found.float() + self.offset if self.offset else found

    def _whole(self) -> Tensor:
        if isinstance(self.weight, QuantTensor):
            weight = self.weight.as_stored().detach().cpu()
            return weight if weight.ndim == 2 else weight.dequantize().reshape(-1, weight.shape[-1])
        *lead, columns, rows = self.weight.shape
        values = self.read(self.name, 0, math.prod(lead) * columns)
        return values.view(*lead, columns, rows).mT.reshape(-1, columns)


def rows_in(model: nn.Module) -> ReadRows:
    """The reader of a model that has its values."""
    tensors: dict[str, Tensor] = dict(_saved(model))

    def read(name: str, start: int, stop: int) -> Tensor:
        weight = tensors[name].detach()
        return weight.reshape(-1, weight.shape[-1])[start:stop].cpu()

    return read


def placements(architecture: Architecture, model: nn.Module, read: ReadRows | None = None) -> list[Placement]:
    """Every tensor of the file, tied weights once.

    read: gives the values of float parameters; by default those that the model has.

    Raises: ExportError naming weights the family does not have.
    """
    config: Any = model.config
    source = read or rows_in(model)
    table = gguf.get_tensor_name_map(_model_arch(architecture.name), config.num_hidden_layers)
    modules = dict(model.named_modules())
    placed: list[Placement] = []
    unknown = []
    for name, weight in _saved(model):
        owner = modules[name.rpartition(".")[0]]
        found = _packed(name, owner, weight, source) or _plain(name, owner, weight, source, architecture, table, config)
        placed += found
        if not found:
            unknown.append(name)
    if unknown:
        raise ExportError(
            f'"{architecture.name}" in llama.cpp has no place for {", ".join(unknown[:5])} '
            f"({len(unknown)} weights); merge adapters and fold wrappers into the model first"
        )
    factors = rotary_factors(config) if architecture.is_rotated else None
    if factors is not None:
        stored_name = f"{gguf.TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
        shape = tuple(factors.shape)
        placed.append(
            Placement("rotary scaling", stored_name, MODEL_TENSOR.ROPE_FREQS, factors, shape, lambda *_: factors[None])
        )
    return placed


def _plain(
    name: str, owner: nn.Module, weight: Tensor, read: ReadRows, architecture: Architecture, table: Any, config: Any
) -> list[Placement]:
    """A parameter that is one tensor."""
    found = table.get_type_and_name(architecture.spelled(name), try_suffixes=(".weight", ".bias"))
    if found is None:
        return []
    role, stored_name = found
    is_transposed = isinstance(owner, Conv1D) and weight.ndim > 1
    shape = tuple(weight.mT.shape if is_transposed else weight.shape)
    if len(shape) == 2 and shape[0] == 1:  # the gate of one expert that all tokens share
        shape = shape[1:]
    order = architecture.orders.get(role)
    rows = None if order is None else order(shape[0], config)
    is_gain = len(shape) == 1 and stored_name.endswith(".weight")
    offset = 1.0 if architecture.has_offset_gains and is_gain else 0.0
    return [Placement(name, stored_name, role, _matrix(weight), shape, read, rows, is_transposed, offset)]


def _packed(name: str, owner: nn.Module, weight: Tensor, read: ReadRows) -> list[Placement]:
    """The experts of a layer [experts, out, in], cut into the tensors that share a parameter."""
    block = _BLOCK.search(name)
    roles = next((roles for tail, roles in _PACKED.items() if name.endswith(tail)), ())
    if weight.ndim != 3 or block is None or not roles:
        return []
    is_transposed = bool(getattr(owner, "is_transposed", False))
    experts, out, columns = weight.mT.shape if is_transposed else weight.shape
    labels = torch.arange(experts * out)
    split = (experts, len(roles), -1) if getattr(owner, "is_concatenated", True) else (experts, -1, len(roles))
    parts = labels.view(split).unbind(1 if split[2] == -1 else 2)
    return [
        Placement(
            name, f"{gguf.TENSOR_NAMES[role].format(bid=block[1])}.weight", role, _matrix(weight),
            (experts, out // len(roles), columns), read, None if len(roles) == 1 else rows.reshape(-1), is_transposed,
        )
        for role, rows in zip(roles, parts, strict=True)
    ]  # fmt: skip


def _matrix(weight: Tensor) -> Tensor:
    """A stored weight as the matrix [rows, in] that it stores, if scales do not forbid it; any other as it is."""
    if not isinstance(weight, QuantTensor):
        return weight
    upright = weight.detach().mT if weight.is_transposed else weight.detach()
    assert isinstance(upright, QuantTensor)
    if upright.ndim == 2 or not upright.surroundings.keeps_weight or upright.spec.rows != 1:
        return upright
    flat = {name: part.reshape(-1, part.shape[-1]) if part.ndim > 1 else part for name, part in upright.parts.items()}
    return upright.with_parts(flat, stored_shape=(math.prod(upright.shape[:-1]), upright.shape[-1]))


def _model_arch(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _saved(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and the buffers that checkpoints hold."""
    saved = model.state_dict().keys()
    return [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in saved)]
