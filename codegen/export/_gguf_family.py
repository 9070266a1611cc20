"""What is said of a family of checkpoints: the vocabulary of the table in `_gguf_architectures`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_TENSOR, GGUFValueType
from torch import Tensor

__all__ = ["BOOL", "FLOAT", "UINT", "Architecture", "Field", "Metadata", "Order"]

UINT, FLOAT, BOOL = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.BOOL


@dataclass(frozen=True)
class Metadata:
    """A key of the file with its value."""

    key: str
    kind: GGUFValueType
    value: Any


@dataclass(frozen=True)
class Field:
    """A metadata key and where the configuration has its value: a name, or a function of it. None leaves it out.

    sets: the setting that the key gives when a file is read, where it is not the source.
    """

    key: str
    kind: GGUFValueType
    source: str | Callable[[Any], Any]
    sets: str | None = None

    @property
    def attribute(self) -> str | None:
        """The setting that follows from the key."""
        return self.sets or (self.source if isinstance(self.source, str) else None)

    def read(self, config: Any) -> Any:
        """The value, or None."""
        return self.source(config) if callable(self.source) else getattr(config, self.source, None)


Order = Callable[[int, Any], Tensor]
"""(number of rows, configuration) -> order of the rows in the file: row i of it is row result[i] of the model."""


@dataclass(frozen=True)
class Architecture:
    """A family.

    name: what llama.cpp calls it. orders: of the rows of some tensors, from their number and the configuration. fixed:
    config names whose one value (or function of the configuration) llama.cpp computes; an absent one counts as that.
    has_offset_gains: vectors are gains less 1 in the model. rotates_partly: of each head, a part is rotated.
    is_rotated: positions are rotations. renamed: parts of names, and how the table of the `gguf` package spells them.
    """

    name: str
    fields: tuple[Field, ...]
    orders: Mapping[MODEL_TENSOR, Order] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    has_offset_gains: bool = False
    rotates_partly: bool = False
    is_rotated: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)

    def spelled(self, name: str) -> str:
        """The name of a parameter as the table of the `gguf` package has it."""
        for ours, theirs in self.renamed.items():
            name = name.replace(ours, theirs)
        return name
