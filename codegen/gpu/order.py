"""How GPU kernels hold a weight: `pack_parts` and `pack_bytes` as layouts that give back what they took.

Codes come back exactly, with two exceptions that are not given back at all: weights with a minimum, whose constant
groups have lost their codes, and codes of levels that two codes share. Scales of groups come back where float16 has
held them. Words of all outputs lie side by side, so no piece of a prepared weight is a view of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ptqc import storage
from ptqc.codegen.gpu.eight_bit import codes_of_bytes, pack_bytes
from ptqc.codegen.gpu.forms import WeightForm
from ptqc.codegen.gpu.parts import codes_of_words, pack_parts, scales_of
from ptqc.held import Layout
from ptqc.spec import SCALE_DTYPES

__all__ = ["ByteOrder", "WordOrder"]

_AT_ONCE = 1024
"""Outputs restored at a time, so that it needs little memory."""


@dataclass(frozen=True)
class WordOrder:
    """A weight [n, k] in 16-bit words.

    reserve: takes the memory that kernels need on a device. name: tells forms apart. is_interleaved: rows of the two
    halves take turns.
    """

    form: WeightForm = field(repr=False, compare=False)
    reserve: Callable[[torch.device], None] = field(repr=False, compare=False)
    name: str
    n: int
    k: int
    is_interleaved: bool

    @property
    def restorable(self) -> tuple[str, ...]:
        """Codes; scales where a row has its own, and they are numbers."""
        spec = self.form.spec
        if spec.zero == "min" or not self._has_inverse:
            return ()
        return ("codes",) if spec.rows != 1 or spec.scale.bits is not None else ("codes", "scale")

    def prepare(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The tensors behind `form.pointers`."""
        prepared = self._pack(parts, self.form, (self.n, self.k), self.is_interleaved)
        self.reserve(prepared[0].device)
        return prepared

    def restore(self, name: str, prepared: Sequence[Tensor], first: int, rows: int) -> Tensor:
        """Codes or scales of rows [first, first + rows)."""
        spec, named = self.form.spec, dict(zip(self.form.pointers, prepared, strict=True))
        outputs = self._outputs(prepared[0].device)[first : first + rows]
        if name == "scale":
            return scales_of(named, self.form, self.k)[outputs].to(SCALE_DTYPES[spec.scale.dtype])
        shape, dtype = storage.part_layout(spec, (rows, self.k))["codes"]
        restored = torch.empty(shape, dtype=torch.uint8, device=outputs.device)
        for at in range(0, rows, _AT_ONCE):
            codes = self._unpack(named["w_ptr"], self.form, outputs[at : at + _AT_ONCE], self.k // spec.vector)
            restored[at : at + len(codes)] = spec.packer.pack(codes, spec.bits)
        return restored.view(dtype)

    def stacked(self, count: int) -> Layout | None:
        """None: pieces are no views."""
        return None

    def cut(self, prepared: Sequence[Tensor], first: int, piece: Layout) -> list[Tensor] | None:
        """The weight itself."""
        return list(prepared) if piece == self and first == 0 else None

    def _outputs(self, device: torch.device) -> Tensor:
        """Where each row of the weight lies."""
        place = torch.arange(self.n, device=device)
        return place.view(-1, 2).T.flatten() if self.is_interleaved else place

    @property
    def _has_inverse(self) -> bool:
        return True

    @property
    def _pack(self) -> Callable[..., list[Tensor]]:
        return pack_parts

    @property
    def _unpack(self) -> Callable[[Tensor, WeightForm, Tensor, int], Tensor]:
        return codes_of_words


@dataclass(frozen=True)
class ByteOrder(WordOrder):
    """A weight in bytes along its inputs."""

    @property
    def _has_inverse(self) -> bool:
        book = self.form.spec.book
        return book is None or len(set(book.levels)) == len(book.levels)

    @property
    def _pack(self) -> Callable[..., list[Tensor]]:
        return pack_bytes

    @property
    def _unpack(self) -> Callable[[Tensor, WeightForm, Tensor, int], Tensor]:
        return codes_of_bytes
