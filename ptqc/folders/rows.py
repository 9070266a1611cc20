"""A float folder as a model without values, and its weights a few rows at a time: for formats that are one file."""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, nn

from ptqc.errors import CheckpointError
from ptqc.folders.architecture import build_empty
from ptqc.folders.folder import ModelFolder
from ptqc.folders.foreign import stored_pieces
from ptqc.folders.safefile import TensorEntry
from ptqc.folders.skeleton import places_of, put
from ptqc.folders.sources import direct_sources

__all__ = ["UnreadModel", "open_unread"]

log = logging.getLogger("ptqc")


@dataclass(frozen=True)
class UnreadModel:
    """model: on the meta device, every tensor of the dtype it is stored in. pieces: the stored tensors of each
    parameter and persistent buffer, one for most, in the order of their rows."""

    model: nn.Module
    pieces: dict[str, list[TensorEntry]]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter as a matrix [all other axes, last axis]."""
        entries = self.pieces[name]
        ends = list(accumulate(prod(entry.shape[:-1]) for entry in entries))
        first = bisect_right(ends, start)
        found = []
        for entry, end in zip(entries[first:], ends[first:], strict=True):
            begin = end - prod(entry.shape[:-1])
            if begin >= stop:
                break
            found.append(entry.rows(max(start, begin) - begin, min(stop, end) - begin))
        return found[0] if len(found) == 1 else torch.cat(found)


def open_unread(stored: ModelFolder, trust_remote_code: bool = False) -> UnreadModel | str:
    """The model of a folder, or why its tensors are not those of the model, cut by rows at most.

    Raises: CheckpointError if the folder is damaged, or transformers cannot build the model.
    """
    if "quantization_config" in stored.config:
        return "it is quantized"
    model = build_empty(stored, trust_remote_code)
    pieces = _pieces(model, stored)
    if isinstance(pieces, str):
        return pieces
    for place in places_of(model):
        name = next((name for name in place.names if name in pieces), None)
        if name is None:
            return f"{place.names[0]} is not stored"
        pieces |= dict.fromkeys(place.names, pieces[name])
        put(place, torch.empty(place.tensor.shape, dtype=pieces[name][0].dtype, device="meta"), name)
    model.config._name_or_path = str(stored.path)
    return UnreadModel(model.eval(), pieces)


def _pieces(model: nn.Module, stored: ModelFolder) -> dict[str, list[TensorEntry]] | str:
    sources = direct_sources(model, stored)
    if not isinstance(sources, str):
        return {name: [entry] for name, entry in sources.entries.items()}
    try:
        names = stored_pieces(model, stored)
    except CheckpointError as error:
        log.info("%s", error)
        return sources
    if sorted(name for parts in names.values() for name in parts) != sorted(stored.entries):
        return sources
    pieces = {name: [stored.entries[part] for part in parts] for name, parts in names.items()}
    return sources if any(_differ(entries) for entries in pieces.values()) else pieces


def _differ(entries: Sequence[TensorEntry]) -> bool:
    return len({(entry.dtype, entry.shape[-1]) for entry in entries}) > 1
