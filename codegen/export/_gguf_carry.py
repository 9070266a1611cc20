"""Stored weights whose codes a GGUF type can hold: nothing is decoded, searched or rounded a second time.

Cases, first match wins; groups run along the row and hold whole blocks of the type (a group of 128 becomes four blocks
of 32 with one scale), and scales are float16 numbers however they are stored:

1. superblocks (scales under scales): the spec of the type itself;
2. the same table of levels: iq4_nl, ternary; or the levels of the spec, less its integer zero, are integers of a type
   without minimum: int4g32 in Q4_0, int4g32z in Q5_0 or Q8_0;
3. a float minimum, in a type with one of at least as many bits: int4g32m in Q4_1;
4. an integer zero in a type with a minimum: codes and scales are kept, and the minimum, scale * zero, is rounded to
   float16 (2^-11 of it). This is the only case that moves numbers, so it is not called lossless.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ptqc import storage
from ptqc.codegen.export._gguf_blocks import BlockType
from ptqc.codegen.export._gguf_layouts import Fields
from ptqc.packing import unpack_linear
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec

__all__ = ["Carried", "carried"]

Bytes = NDArray[np.uint8]
_Way = Literal["superblock", "table", "levels", "minimum", "zero"]


@dataclass(frozen=True)
class Carried:
    """A stored weight [out, in] that `kind` holds. way: which case."""

    weight: QuantTensor
    kind: BlockType
    way: _Way

    @property
    def is_exact(self) -> bool:
        """Whether every number stays as it is."""
        return self.way != "zero"

    def blocks(self, at: slice) -> Bytes:
        """Packed blocks [n, nbytes] of the rows `at`."""
        assert self.kind.layout is not None
        return self.kind.layout.pack(self._fields(at))

    def _fields(self, at: slice) -> Fields:
        spec, columns, width = self.weight.spec, self.weight.shape[1], self.kind.weights
        codes = spec.packer.unpack(self.weight.codes[at], spec.bits, columns)
        if self.way == "superblock":
            return self._superblocks(codes.cpu().numpy().reshape(-1, width), at)
        scale, zero = _read(self.weight)
        per_group = columns // scale.shape[1]
        floats = [scale[at].half().repeat_interleave(per_group // width, dim=1)]
        if self.way == "levels":
            assert self.kind.spec is not None
            levels = storage.levels(codes, spec)
            if zero is not None:
                levels = levels - zero[at].repeat_interleave(per_group, dim=1)
            codes = (levels + 2 ** (self.kind.spec.bits - 1)).to(torch.uint8)
        if self.way in ("minimum", "zero") and zero is not None:
            minimum = zero if self.way == "minimum" else zero * scale
            floats.append((-minimum[at]).half().repeat_interleave(per_group // width, dim=1))
        numbers = torch.stack(floats, -1).reshape(-1, len(floats)).cpu().numpy()
        return Fields(codes.cpu().numpy().reshape(-1, width), numbers, np.empty((len(numbers), 0), np.uint8))

    def _superblocks(self, codes: Bytes, at: slice) -> Fields:
        spec, parts = self.weight.spec, self.weight.parts
        rows, columns = self.weight.shape
        per_row = columns // self.kind.weights
        names = ["scale", "zero"] if spec.zero == "min" else ["scale"]
        groups = columns // (spec.group or 1)
        integers = [unpack_linear(parts[name][at], spec.scale.bits or 8, groups) for name in names]
        outer = [parts[f"{name}_outer"].view(rows, per_row)[at].reshape(-1) for name in names]
        scales = torch.cat([part.reshape(len(codes), -1) for part in integers], dim=1)
        return Fields(codes, torch.stack(outer, 1).cpu().numpy(), scales.cpu().numpy())


def carried(weight: Tensor, kind: BlockType) -> Carried | None:
    """How a weight [out, in] is carried over into a type; None if it is not."""
    if not isinstance(weight, QuantTensor) or kind.spec is None or weight.is_transposed or weight.ndim != 2:
        return None
    if not weight.surroundings.keeps_weight or weight.spec.rows != 1:
        return None
    way = _way(weight.spec, kind.spec, weight.shape[1])
    if way is None or way == "superblock":
        return None if way is None else Carried(weight, kind, way)
    scale, zero = _read(weight)
    floats = [scale] if way != "minimum" or zero is None else [scale, zero]
    if not all(torch.equal(part.half().float(), part) for part in floats):
        return None
    if way == "zero" and zero is not None and not bool(torch.isfinite((zero * scale).half()).all()):
        return None
    return Carried(weight, kind, way)


def _read(weight: QuantTensor) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros; codes are left alone, which a compiled model would have to put in order first."""
    names = [name for name in storage.part_names(weight.spec) if name != "codes"]
    parts = {name: getattr(weight, name) for name in names}
    return storage.decode_scales(parts, weight.spec, weight.stored_shape)


def _way(spec: WeightSpec, target: WeightSpec, columns: int) -> _Way | None:
    """Which case a spec is, as far as the spec tells."""
    if spec.vector != 1 or (spec.book is not None and spec.book.float_dtype is not None):
        return None
    if target.scale.bits is not None:
        return "superblock" if replace(spec, packing=target.packing) == target else None
    if (spec.group or columns) % (target.group or columns):
        return None
    if target.zero == "min":
        fits = spec.book is None and spec.bits <= target.bits
        ways: dict[str, _Way] = {"min": "minimum", "int": "zero"}
        return ways.get(spec.zero) if fits else None
    if target.book is not None:
        return "table" if spec.codebook == target.codebook and spec.zero == "none" else None
    return "levels" if _is_within(spec, -(2 ** (target.bits - 1)), 2 ** (target.bits - 1) - 1) else None


def _is_within(spec: WeightSpec, lowest: int, highest: int) -> bool:
    """Whether every level of `spec`, less any zero, is an integer of lowest..highest."""
    if spec.zero not in ("none", "int"):
        return False
    if spec.book is None:
        steps = (1 << spec.bits) - 1
        low = -steps if spec.zero == "int" else -(1 << (spec.bits - 1))
        high = steps if spec.zero == "int" else low + steps
        return bool(lowest <= low and high <= highest)
    table = spec.book.table()
    is_within = (table == table.round()) & (table >= lowest) & (table <= highest)
    return spec.zero == "none" and bool(is_within.all())
