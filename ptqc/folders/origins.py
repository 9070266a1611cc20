"""Where an export takes its tensors from: a model in memory, or a folder that is read one tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from ptqc.folders.foreign import open_foreign
from ptqc.folders.shards import Append, Block
from ptqc.qtensor import QuantTensor

__all__ = ["Origin", "of_folder", "of_model"]


@dataclass(frozen=True)
class Origin:
    """A model to export.

    tensors: every tensor by its name, tied ones once; those of folders are described on the meta device. read: the
    values of one. order: the order of the inputs of a quantized one. tied: for further names the one that is stored.
    modules: the architecture, perhaps without values. plain: the block that writes a tensor as it is. write_files:
    writes everything but tensors, given the `quantization_config` and a tokenizer.
    """

    tensors: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    order: Callable[[str], Tensor | None]
    tied: Mapping[str, str]
    modules: nn.Module
    plain: Callable[[str], Block]
    write_files: Callable[[Path, Mapping[str, Any], Any], None]


def of_model(model: nn.Module) -> Origin:
    """A model in memory."""
    kept, tied = untied(model.state_dict(keep_vars=True))

    def plain(name: str) -> Block:
        tensor = kept[name].detach()

        def produce(append: Append) -> None:
            append(name, tensor)

        return Block(name, {name: (tuple(tensor.shape), tensor.dtype)}, produce)

    def write_files(staging: Path, quantization: Mapping[str, Any], tokenizer: Any) -> None:
        write_model_files(model, quantization, tied, staging, tokenizer)

    def order(name: str) -> Tensor | None:
        weight = kept[name]
        return weight.extras.get("order") if isinstance(weight, QuantTensor) else None

    return Origin(kept, lambda name: kept[name].detach(), order, tied, model, plain, write_files)


def of_folder(stored: ModelFolder, trust_remote_code: bool = False) -> Origin:
    """A folder: float, quantized by ptqc, or in another dialect.

    Raises: CheckpointError if it is damaged, or transformers cannot build the model.
    """
    modules = build_empty(stored, trust_remote_code)
    foreign = open_foreign(stored)
    if foreign is not None:
        weights, plain, read_weight = dict(foreign.weights), dict(foreign.floats), foreign.read
        tied: Mapping[str, str] = {}
    else:
        manifest = manifest_in(stored)
        parts, tied = manifest.layout(), manifest.tied
        weights = {name: described(w.spec, w.shape, w.dtype, w.surroundings, w.is_transposed)
                   for name, w in manifest.weights.items()}  # fmt: skip
        plain = {name: entry for name, entry in stored.entries.items() if name not in parts}

        def read_weight(name: str) -> QuantTensor:
            weight = manifest.weights[name]
            return weight.build({part.rpartition(".")[2]: stored.entries[part].read() for part in weight.layout(name)})

    floats = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in plain.items()}

    def order(name: str) -> Tensor | None:
        weight = weights.get(name)
        if weight is None or not weight.surroundings.order:
            return None
        entry = stored.entries.get(f"{name}.order")
        return read_weight(name).extras["order"] if entry is None else entry.read()

    def write_files(staging: Path, quantization: Mapping[str, Any], tokenizer: Any) -> None:
        copy_companions(stored.path, staging, with_code=trust_remote_code)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        write_config(staging, stored, quantization, model_dtype(stored))

    return Origin(
        {**weights, **floats}, lambda name: read_weight(name) if name in weights else plain[name].read(), order, tied,
        modules, lambda name: copied(name, plain[name]), write_files,
    )  # fmt: skip
