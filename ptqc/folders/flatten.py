"""State dicts with quantized weights as plain tensors, and back: for safetensors and everything that knows only those.

safetensors itself refuses a tensor subclass, or two names for one storage, with an error that does not say so.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ptqc.errors import CheckpointError
from ptqc.folders.manifest import Manifest, manifest_of
from ptqc.folders.safefile import DTYPES
from ptqc.qtensor import QuantTensor

__all__ = ["flatten_state_dict", "parts_of", "unflatten_state_dict", "untied"]

_KEY = "ptqc"


def flatten_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split every quantized weight into its parts and extras, named "<name>.<part>"; tied tensors are kept once.

    Returns tensors and metadata, both as `safetensors.torch.save_file` takes them.

    Raises: CheckpointError for an entry that no safetensors file can hold.
    """
    kept, tied = untied(state_dict)
    config = manifest_of(kept, tied).to_config()
    return parts_of(kept), {"format": "pt", _KEY: json.dumps(config)}


def unflatten_state_dict(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Invert `flatten_state_dict`: quantized weights again, and every tied name.

    Raises: CheckpointError if metadata and tensors disagree.
    """
    where = "the state dict"
    try:
        config = json.loads(metadata[_KEY])
    except KeyError:
        raise CheckpointError(f"{where} has no {_KEY!r} in its metadata; write it with flatten_state_dict") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where} has broken metadata ({_KEY!r} is no JSON); write it again") from None
    manifest = Manifest.from_config(config, where)
    manifest.check({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, where)
    parts = manifest.layout()
    state = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, stored in manifest.weights.items():
        state[name] = stored.build({part.rpartition(".")[2]: tensors[part] for part in stored.layout(name)})
    for alias, name in manifest.tied.items():
        if name not in state:
            raise CheckpointError(f"{where} ties {alias} to {name}, which is missing; write it again")
        state[alias] = state[name]
    return state


def untied(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each distinct tensor under its first name, and for every further name that first one.

    Raises: CheckpointError for an entry that no safetensors file can hold.
    """
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in state_dict.items():
        _check(name, tensor)
        owner = first.setdefault(_identity(tensor), name)
        if owner == name:
            kept[name] = tensor
        else:
            tied[name] = owner
    return kept, tied


def parts_of(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict by their names in a checkpoint: quantized weights as their parts."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, QuantTensor):
            tensors |= {f"{name}.{part}": value for part, value in tensor.tensors.items()}
        else:
            tensors[name] = tensor.detach()
    if len(tensors) != sum(len(t.stored_layout) if isinstance(t, QuantTensor) else 1 for t in state_dict.values()):
        raise CheckpointError("a part of a quantized weight has the name of another tensor; rename the module")
    return tensors


def _check(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f'"{name}" is a {type(tensor).__name__}; only tensors can be saved, drop it')
    if tensor.is_meta:
        raise CheckpointError(f'"{name}" is on the meta device: it has no values; load the model without offloading')
    if isinstance(tensor, QuantTensor):
        return
    if is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
        kind = f"a {type(tensor).__name__} of {tensor.dtype}"
        raise CheckpointError(f'"{name}" is {kind}; only plain tensors and ptqc weights can be saved, dequantize it')


def _identity(tensor: Tensor) -> object:
    """Equal for two tensors that are one: the same memory, read in the same way."""
    memory, first = tensor.memory if isinstance(tensor, QuantTensor) else (tensor, 0)
    if memory.numel() == 0:
        return id(tensor)
    where = memory.device, memory.data_ptr(), first
    return *where, tensor.shape, tensor.stride(), tensor.dtype, type(tensor) is QuantTensor
