"""Where an export takes its tensors from: a model in memory, or a folder that is read one tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqc.codegen.dialect import described
from ptqc.folders.architecture import build_empty
from ptqc.folders.checkpoint import manifest_in, write_model_files
from ptqc.folders.conversion import copied, model_dtype, write_config
from ptqc.folders.flatten import untied
from ptqc.folders.folder import ModelFolder, copy_companions
from ptqc.folders.foreign import Foreign, open_foreign, turned
from ptqc.folders.naming import Piece, stored_names
from ptqc.folders.shards import Append, Block
from ptqc.folders.sources import targets_of
from ptqc.qtensor import QuantTensor

__all__ = ["Origin", "of_folder", "of_model"]

WriteFiles = Callable[[Path, Mapping[str, Any], Any], None]


@dataclass(frozen=True)
class Origin:
    """A model to export.

    tensors: every tensor by its name in a folder, tied ones once, on the meta device. read: the values of one.
    source: the parameter that each comes from. plain: the block that writes a float tensor as it is. modules: the
    architecture, perhaps without values. write_files: writes everything but tensors, given the `quantization_config`
    and a tokenizer.
    """

    tensors: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    source: Mapping[str, str]
    plain: Callable[[str], Block]
    modules: nn.Module
    write_files: WriteFiles

    def order(self, name: str) -> Tensor | None:
        """The order of the inputs of a quantized weight, where it has one."""
        weight = self.tensors[name]
        if not isinstance(weight, QuantTensor) or not weight.surroundings.order:
            return None
        read = self.read(name)
        assert isinstance(read, QuantTensor)
        return read.extras["order"]


def of_model(model: nn.Module) -> Origin:
    """A model in memory."""
    kept, tied = untied(model.state_dict(keep_vars=True))

    def write_files(staging: Path, quantization: Mapping[str, Any], tokenizer: Any) -> None:
        write_model_files(model, quantization, tied, staging, tokenizer)

    return _cut(model, kept, lambda name: kept[name].detach(), write_files)


def of_folder(stored: ModelFolder, trust_remote_code: bool = False) -> Origin:
    """A folder: float, quantized by ptqc, or in the format of another program.

    Raises: CheckpointError if it is damaged, or transformers cannot build the model.
    """
    modules = build_empty(stored, trust_remote_code)
    foreign = open_foreign(stored)
    if foreign is not None:
        foreign = turned(foreign, modules, targets_of(modules, foreign.weights))

    def write_files(staging: Path, quantization: Mapping[str, Any], tokenizer: Any) -> None:
        copy_companions(stored.path, staging, with_code=trust_remote_code)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write_config(staging, stored, quantization, model_dtype(stored))

    if foreign is None and "quantization_config" in stored.config:
        return _of_ours(stored, modules, write_files)
    return _of_theirs(stored, foreign, modules, write_files)


def _of_ours(stored: ModelFolder, modules: nn.Module, write_files: WriteFiles) -> Origin:
    """Parameters have the names of the model in our folders."""
    manifest = manifest_in(stored)
    parts = manifest.layout()
    tensors: dict[str, Tensor] = {
        name: described(weight.spec, weight.shape, weight.dtype, weight.surroundings, weight.is_transposed)
        for name, weight in manifest.weights.items()
    }
    floats = {name: entry for name, entry in stored.entries.items() if name not in parts}
    tensors |= {name: _empty(entry.shape, entry.dtype) for name, entry in floats.items()}

    @lru_cache(maxsize=1)  # the pieces of a parameter are asked for one after the other
    def read(name: str) -> Tensor:
        if name in floats:
            return floats[name].read()
        weight = manifest.weights[name]
        return weight.build({part.rpartition(".")[2]: stored.entries[part].read() for part in weight.layout(name)})

    return _cut(modules, tensors, read, write_files)


def _of_theirs(stored: ModelFolder, foreign: Foreign | None, modules: nn.Module, write_files: WriteFiles) -> Origin:
    """Tensors have the names of folders already."""
    weights = {} if foreign is None else foreign.weights
    floats = stored.entries if foreign is None else foreign.floats
    tensors: dict[str, Tensor] = dict(weights)
    tensors |= {name: _empty(entry.shape, entry.dtype) for name, entry in floats.items()}

    def read(name: str) -> Tensor:
        return foreign.read(name) if foreign is not None and name in weights else floats[name].read()

    state = modules.state_dict(keep_vars=True)
    source = {name: piece.name for name, piece in stored_names(modules, state).items()}
    source = {name: source.get(name, name) for name in tensors}
    return Origin(tensors, read, source, lambda name: copied(name, floats[name]), modules, write_files)


def _cut(
    modules: nn.Module, state: Mapping[str, Tensor], read: Callable[[str], Tensor], write_files: WriteFiles
) -> Origin:
    """A model whose tensors have its own names, cut and renamed as folders have them."""
    pieces = stored_names(modules, state)
    metas = {name: _meta(tensor) for name, tensor in state.items()}
    tensors = {stored: piece.of(metas[piece.name]) for stored, piece in pieces.items()}

    def plain(stored: str) -> Block:
        piece, meta = pieces[stored], tensors[stored]

        def produce(append: Append) -> None:
            append(stored, _plain(piece, read(piece.name)))

        return Block(stored, {stored: (tuple(meta.shape), meta.dtype)}, produce)

    source = {stored: piece.name for stored, piece in pieces.items()}
    return Origin(
        tensors, lambda stored: pieces[stored].of(read(pieces[stored].name)), source, plain, modules, write_files
    )


def _plain(piece: Piece, parameter: Tensor) -> Tensor:
    return piece.of(parameter.dequantize() if isinstance(parameter, QuantTensor) else parameter)


def _meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, QuantTensor):
        return described(
            tensor.spec, tensor.stored_shape, tensor.dtype, tensor.surroundings, is_transposed=tensor.is_transposed
        )
    return _empty(tensor.shape, tensor.dtype)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
