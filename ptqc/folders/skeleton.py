"""Filling a module with the tensors of a checkpoint, name by name, strictly."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptqc.errors import CheckpointError
from ptqc.folders.folder import ModelFolder
from ptqc.folders.manifest import Manifest
from ptqc.qtensor import QuantTensor

__all__ = ["Place", "fill_skeleton", "places_of", "put"]


@dataclass(frozen=True)
class Place:
    """A tensor of the skeleton: every name it has there, and every (module, attribute) that holds it."""

    tensor: Tensor
    names: list[str]
    owners: list[tuple[nn.Module, str]]


def fill_skeleton(
    model: nn.Module, stored: ModelFolder, manifest: Manifest, dtype: torch.dtype | None = None
) -> nn.Module:
    """Replace every parameter and persistent buffer of `model` by the stored one; tied ones stay tied. In place.

    dtype: what floating-point tensors become and quantized weights pretend to be; None keeps what was saved.

    Raises: CheckpointError if names or shapes do not match one to one.
    """
    places = places_of(model)
    sources = _sources(places, stored, manifest)
    placed: dict[str, Tensor] = {}
    for place, name in zip(places, sources, strict=True):
        value = placed.get(name)
        read = _read(stored, manifest, name, dtype) if value is None else value
        placed[name] = put(place, read, f"{name} of {stored.path}")
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CheckpointError(f"{stored.path} has no values for {left[0]} (not saved); build the skeleton on the cpu")
    return model


def places_of(model: nn.Module) -> list[Place]:
    """Every parameter and persistent buffer of a model, tied ones once."""
    persistent = model.state_dict(keep_vars=True)
    places: dict[int, Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{prefix}.{attribute}" if prefix else attribute
            if tensor is not None and name in persistent:
                place = places.setdefault(id(tensor), Place(tensor, [], []))
                place.names.append(name)
                place.owners.append((module, attribute))
    return list(places.values())


def _sources(places: list[Place], stored: ModelFolder, manifest: Manifest) -> list[str]:
    """The stored name for each place."""
    parts = manifest.layout()
    available = {name for name in stored.entries if name not in parts} | set(manifest.weights)
    found = []
    for place in places:
        names = (manifest.tied.get(name, name) for name in place.names)
        found.append(next((name for name in names if name in available), None))
    missing = [place.names[0] for place, name in zip(places, found, strict=True) if name is None]
    unexpected = sorted(available.difference(name for name in found if name))
    if missing or unexpected:
        raise CheckpointError(
            f"{stored.path} does not fit the skeleton: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} too many {unexpected[:3]}; give a module like the one that was saved"
        )
    return [name for name in found if name is not None]


def _read(stored: ModelFolder, manifest: Manifest, name: str, dtype: torch.dtype | None) -> Tensor:
    weight = manifest.weights.get(name)
    if weight is not None:
        parts = {part.rpartition(".")[2]: stored.entries[part].read() for part in weight.layout(name)}
        return weight.build(parts, dtype)
    tensor = stored.entries[name].read()
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def put(place: Place, value: Tensor, name: str) -> Tensor:
    """Put a tensor in a place. name: what to call it in messages. Returns what the model holds then.

    Raises: CheckpointError for another shape, or another kind of numbers.
    """
    if value.shape != place.tensor.shape:
        found, wanted = tuple(value.shape), tuple(place.tensor.shape)
        raise CheckpointError(f"{name} is stored with shape {found}, the skeleton has {wanted}; give the right module")
    if (value.is_floating_point(), value.is_complex()) != (place.tensor.is_floating_point(), place.tensor.is_complex()):
        wanted_dtype = place.tensor.dtype
        raise CheckpointError(f"{name} is stored as {value.dtype}, the skeleton has {wanted_dtype}; save it again")
    is_parameter = isinstance(place.tensor, nn.Parameter)
    if is_parameter and not isinstance(value, nn.Parameter):
        trains = place.tensor.requires_grad and not isinstance(value, QuantTensor)
        value = nn.Parameter(value, requires_grad=trains)
    for module, attribute in place.owners:
        setattr(module, attribute, value)  # recurrent modules keep lists of their weights, and update them
    return value
