"""The recorder: statistics by input value, found again by the weights that read it.

An observer in a graph hands it a value and the parameters that the value is multiplied with. Parameters are known by
identity, since dynamo runs one compiled graph for every module of a class. Parameters that read the same values have
one accumulator: query, key and value share a Hessian, and what is made of it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ptqc.passes.observe.layout import Layout
from ptqc.passes.observe.reduce import gathered, is_alone, reduce_statistics
from ptqc.statistics import Statistics

__all__ = ["Key", "Recorder", "Slot", "Weight"]

Weight = TypeVar("Weight", bound=Tensor)

Slot = tuple[tuple[int, ...], int, int | None]
"""One accumulator: numbers of the weights that read the value, its features, and the experts of a stack."""
Key = tuple[Slot, ...]
"""The accumulators that make up the statistics of a weight; equal for weights that read the same values."""

_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "labels")


class Recorder:
    """Gathers the statistics that weights want. Call `begin` before each batch."""

    def __init__(self, wanted: Mapping[Weight, Collection[str]], *, seed: int = 0) -> None:
        """wanted: names of statistics by weight, in an order that is the same on every process. seed: of the rows."""
        self.parameters: list[Tensor] = list(wanted)
        self.wanted = [frozenset(names) for names in wanted.values()]
        self.seed = seed
        self.slots: dict[Slot, Statistics] = {}
        self.reasons: dict[int, str] = {}
        self._numbers = {id(parameter): number for number, parameter in enumerate(self.parameters)}
        self._made: dict[Key, dict[str, Tensor]] = {}
        self._batch = 0
        self._mask: Tensor | None = None

    def begin(self, number: int, batch: Mapping[str, Any]) -> None:
        """Announce a batch. number: among all batches of all processes.

        Where it has an "attention_mask" [rows, tokens] of the shape of a value's leading axes (or a value has as many
        rows as it has entries), rows that it hides do not count. Rows routed to experts cannot be told and count; so
        do all rows of a model with a decoder of its own, whose two masks cannot be told apart.
        """
        self._batch = number
        mask = batch.get("attention_mask")
        is_plain = isinstance(mask, Tensor) and mask.ndim == 2 and not any(name in batch for name in _DECODER_INPUTS)
        self._mask = mask.bool() if is_plain and mask is not None and not bool(mask.all()) else None

    def take(self, x: Tensor, weights: Sequence[Tensor], layout: Layout, index: Tensor | int | None = None) -> None:
        """Take in a value that is multiplied with `weights`. index: what `layout` reads."""
        numbers = sorted({self._numbers[id(weight)] for weight in weights if id(weight) in self._numbers})
        if not numbers or not x.is_floating_point():
            return
        rows, experts = layout.rows(x.detach(), index)
        slot: Slot = (tuple(numbers), rows.shape[-1], layout.experts)
        if slot not in self.slots:
            self.slots[slot] = self.empty(slot, x.device)
        mask = self._mask_of(rows) if experts is None else None
        self.slots[slot].update(rows, experts, mask=mask, batch=self._batch)
        self._made.clear()

    def empty(self, slot: Slot, device: torch.device | None = None) -> Statistics:
        """A new accumulator for a slot: of all that its weights want."""
        numbers, features, experts = slot
        names = frozenset().union(*(self.wanted[number] for number in numbers))
        return Statistics(features, names, experts=experts, seed=self.seed, device=device)

    def _mask_of(self, rows: Tensor) -> Tensor | None:
        if self._mask is None:
            return None
        is_flat = rows.ndim == 2 and len(rows) == self._mask.numel()
        return self._mask if is_flat or rows.shape[:-1] == self._mask.shape else None

    def note(self, weights: Sequence[Tensor], reason: str) -> None:
        """Record why an input of `weights` cannot be observed."""
        for weight in weights:
            if id(weight) in self._numbers:
                self.reasons.setdefault(self._numbers[id(weight)], reason)

    def key(self, parameter: Tensor) -> Key:
        """What the statistics of a weight are made of; () if nothing was seen. Fit to cache by."""
        number = self._numbers[id(parameter)]
        return tuple(sorted((slot for slot in self.slots if number in slot[0]), key=str))

    def statistics(self, parameter: Tensor) -> dict[str, Tensor]:
        """Statistics of the input of a weight, see `ptqc.statistics`: at least what it wanted.

        {} if nothing was seen. Weights of equal `key` get the same mapping, which is not to be changed.
        """
        key = self.key(parameter)
        if key and key not in self._made:
            self._made[key] = self._merged(key).result()
        return self._made[key] if key else {}

    def close(self) -> None:
        """Let go of weights, accumulators and results. A graph with observers is a cycle and may live for a while."""
        self.parameters.clear()
        self.slots.clear()
        self._made.clear()

    def forget(self, parameter: Tensor) -> None:
        """Drop what `statistics` made for a weight (and those that share it); it can be made again."""
        self._made.pop(self.key(parameter), None)

    def all_reduce(self) -> None:
        """Give every process under torchrun the statistics of all of them, in place; nothing for one process.

        Accumulators are named by the numbers of their weights, so processes agree on them; one that never saw a value
        takes part with an empty one.
        """
        if is_alone():
            return
        for slot in sorted({slot for slots in gathered(list(self.slots)) for slot in slots}, key=str):
            if slot not in self.slots:
                self.slots[slot] = self.empty(slot, self.parameters[slot[0][0]].device)
            reduce_statistics(self.slots[slot])
        self._made.clear()
        for reasons in gathered(self.reasons):
            for number, reason in reasons.items():
                self.reasons.setdefault(number, reason)

    def _merged(self, key: Key) -> Statistics:
        first = self.slots[key[0]]
        if len(key) == 1:
            return first
        common = frozenset.intersection(*(self.slots[slot].wanted for slot in key))
        merged = first.restricted(common).empty()
        for slot in key:
            merged.merge(self.slots[slot].restricted(common))
        return merged

    def reason(self, parameter: Tensor) -> str | None:
        """Why statistics of a weight are missing or not to be used; None if they are complete."""
        number = self._numbers[id(parameter)]
        if number in self.reasons:
            return self.reasons[number]
        key = self.key(parameter)
        if not any(bool(self.slots[slot].count.any()) for slot in key):
            return "no calibration data reached it"
        return None if all(self.slots[slot].is_finite for slot in key) else "its inputs are not all finite"

    def coverage(self, parameter: Tensor) -> Tensor:
        """How many rows each expert of a stack saw, [experts] int64 ([1] for a matrix)."""
        key = self.key(parameter)
        if key:
            return torch.stack([self.slots[slot].count.cpu() for slot in key]).sum(0)
        return torch.zeros(parameter.shape[0] if parameter.ndim > 2 else 1, dtype=torch.int64)
