"""Which tensor of a folder each parameter of a model comes from, by the renaming rules of transformers."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptqc.errors import CheckpointError
from ptqc.folders.folder import ModelFolder
from ptqc.folders.safefile import TensorEntry

__all__ = ["Sources", "direct_sources", "targets_of"]

log = logging.getLogger("ptqc")


@dataclass(frozen=True)
class Sources:
    """entries: the stored tensor of each parameter and persistent buffer, tied ones under their first name.
    tied: for every further name that first one."""

    entries: Mapping[str, TensorEntry]
    tied: Mapping[str, str]


def direct_sources(model: Any, stored: ModelFolder) -> Sources | str:
    """Match a transformers model, which may be on the meta device, with a folder.

    Returns the reason instead if some parameter is not simply one of the tensors: 1. it is converted while loading
    (merged, split, transposed); 2. tied parameters are stored twice with different values.

    Raises: CheckpointError for a parameter that is missing, or has another shape.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    found: dict[str, TensorEntry] = {}
    for name, (target, is_converted) in _targets(model, stored.entries).items():
        if target not in state:
            log.info("%s is no parameter of the model; left out", name)
            continue
        if is_converted:
            return f"{name} is converted while it is loaded"
        if tuple(state[target].shape) != stored.entries[name].shape:
            shapes = f"{stored.entries[name].shape}, config.json makes it {tuple(state[target].shape)}"
            raise CheckpointError(f"{stored.entries[name].path} holds {name} of shape {shapes}; give the right config")
        found[target] = stored.entries[name]
    sources, missing = _untied(model, state, found)
    if missing:
        raise CheckpointError(f"{stored.path} lacks {missing[0]} ({len(missing)} missing); download it again")
    return sources


def _untied(
    model: Any, state: Mapping[str, Tensor], found: Mapping[str, TensorEntry]
) -> tuple[Sources | str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    entries = {}
    missing = []
    for first, *others in names.values():
        candidates = [found[name] for name in (first, *others) if name in found]
        if any(not _same(candidates[0], other) for other in candidates[1:]):
            return f"{first} is tied, but stored twice with different values", []
        if candidates:
            entries[first] = candidates[0]
        elif isinstance(state[first], nn.Parameter) and not _may_miss(model, first):
            missing.append(first)
    return Sources(entries, {other: first for first, *others in names.values() for other in others}), missing


def _targets(model: Any, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """For each stored name the parameter that transformers loads it into, and whether it converts it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    targets = {}
    for name in sorted(names, key=dot_natural_key):  # transformers' order; some rules depend on it
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        targets[name] = (target, pattern is not None)
    return targets


def targets_of(model: Any, names: Iterable[str]) -> dict[str, str]:
    """For each name in a folder the parameter that transformers loads it into."""
    return {name: target for name, (target, _) in _targets(model, names).items()}


def _may_miss(model: Any, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _same(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(torch.equal(a, b) for a, b in zip(one.pieces(), other.pieces(), strict=True))
