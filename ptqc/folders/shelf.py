"""The float parameters of a folder, read when they are asked for, and what the engine makes of them, piece by piece."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptqc.engine.pieces import Piece
from ptqc.errors import WeightError
from ptqc.folders.artefacts import Artefact, WorkFolder
from ptqc.folders.safefile import TensorEntry
from ptqc.qtensor import QuantTensor

__all__ = ["Shelf"]


@dataclass
class Shelf:
    """Weights and checkpoints of a sequential run over a folder.

    entries: the stored tensor of each parameter. dtypes: what each is stored as in the output. biases: the bias beside
    a weight. jobs: names of the weights to quantize. shared: parameters that several pieces read. Everything is float32
    in memory; what stays in float is rounded to the output's dtype as soon as it changes, so that the pieces that
    follow see what will be written.
    """

    entries: Mapping[str, TensorEntry]
    dtypes: Mapping[str, torch.dtype]
    biases: Mapping[str, str]
    jobs: Collection[str]
    shared: Collection[str]
    folder: WorkFolder
    artefacts: dict[int, Artefact] = field(default_factory=dict)
    resumed: int = 0
    _floats: dict[str, Tensor] = field(default_factory=dict)
    _changed: set[str] = field(default_factory=set)
    """Float parameters that the piece at work has changed."""
    _folded: set[str] = field(default_factory=set)
    """Those that any piece has changed."""
    _stored: dict[str, QuantTensor] = field(default_factory=dict)
    _before: str = ""
    """Digest of the last artefact."""

    # ---------------------------------------------------------------- weights

    def read(self, name: str) -> Tensor:
        """The float values as they are now, float32."""
        if name not in self._floats:
            entry = self.entries[name]
            if not entry.dtype.is_floating_point:
                raise WeightError(f'"{name}" is {entry.dtype} in {entry.path}; only float parameters can be calibrated')
            self._floats[name] = entry.read().float()
        return self._floats[name]

    def fold(self, name: str, value: Tensor) -> None:
        """Keep other values for a parameter."""
        self._floats[name] = value.float() if name in self.jobs else value.to(self.dtypes[name]).float()
        self._changed.add(name)
        self._folded.add(name)

    def store(self, name: str, weight: QuantTensor) -> None:
        """Keep the quantized form; the floats are not needed again."""
        self._stored[name] = weight
        self._floats.pop(name, None)
        self._changed.discard(name)

    def current(self, name: str) -> Tensor:
        """The quantized form if there is one, else the floats."""
        return self._stored[name] if name in self._stored else self.read(name)

    def bias_of(self, name: str) -> str | None:
        """The bias beside a weight."""
        return self.biases.get(name)

    # ---------------------------------------------------------------- checkpoints

    def restore(self, piece: Piece, names: Sequence[str]) -> Mapping[str, Any] | None:
        """Take a finished piece from the folder, and what was said of it; None if it is not there."""
        artefact = self.folder.read(piece.index, self._key(piece, names))
        if artefact is None:
            return None
        for name, value in artefact.state().items():
            if isinstance(value, QuantTensor):
                self.store(name, value.with_parts(value.parts, dtype=torch.float32))
            else:
                self._floats[name] = value.float()
                self._folded.add(name)
        self._keep(piece, artefact)
        self.resumed += 1
        return artefact.said

    def keep(self, piece: Piece, names: Sequence[str], said: Mapping[str, Any]) -> None:
        """Write a finished piece into the folder."""
        state: dict[str, Tensor] = {}
        for name, weight in ((name, self._stored[name]) for name in names if name in self._stored):
            state[name] = weight.with_parts(weight.parts, dtype=self.dtypes[name])
        for name in sorted(self._changed):
            state[name] = self._floats[name].to(self.dtypes[name])
        self._keep(piece, self.folder.write(piece.index, self._key(piece, names), state, said))

    def _keep(self, piece: Piece, artefact: Artefact) -> None:
        self.artefacts[piece.index] = artefact
        self._before = artefact.digest
        self._changed.clear()

    def _key(self, piece: Piece, names: Sequence[str]) -> str:
        placeholders = [f"{node.name} {name}" for node, name in piece.program.names.items()]
        return self.folder.key(piece.index, self._before, [*names, *placeholders, str(piece.program.graph)])

    def leave(self, piece: Piece) -> None:
        """Forget parameters, but for changes that a later piece has to see."""
        self._stored = {name: weight for name, weight in self._stored.items() if name in self.shared}
        changed = self._folded.intersection(self.shared)
        self._floats = {name: value for name, value in self._floats.items() if name in changed}
