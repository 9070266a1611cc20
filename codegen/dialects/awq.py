"""AWQ in its GEMM order, as AutoAWQ, GPTQModel and vLLM store it: 4 bits with zero points.

    qweight   int32 [in, out / 8]      codes along `out`; nibble k of word j is output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[k]
    qzeros    int32 [groups, out / 8]  zeros, in the same order
    scales    float16 [groups, out]

W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = i // group. What AWQ multiplied weights with is folded into
the layers before, so nothing here tells of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ptqc.act_spec import ActSpec
from ptqc.codegen.dialect import (
    DIALECTS,
    Entries,
    Inventory,
    Tails,
    conv1d_notes,
    damaged,
    describe_or_refuse,
    nearest_integer,
    needed,
    plain_reason,
    scale_dtype_name,
    single,
)
from ptqc.codegen.words import Groupwise, Lay, groups_of, groupwise_of, integer_reason, weight_of
from ptqc.errors import CheckpointError
from ptqc.qtensor import QuantTensor
from ptqc.spec import ScaleSpec, WeightSpec

__all__ = ["AWQ"]

_BITS = 4
_LAY = Lay("out", turned=True, places=(0, 2, 4, 6, 1, 3, 5, 7))


@DIALECTS.register("awq")
@dataclass(frozen=True)
class AWQ:
    """Writes and reads AWQ. Symmetric weights are stored with zeros of 8."""

    example: ClassVar[str] = "int4g128z"
    tails: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    markers: ClassVar[tuple[str, ...]] = ("qweight",)

    @staticmethod
    def of_config(config: Mapping[str, Any], where: str) -> "AWQ":
        """See `ptqc.codegen.dialect.Dialect`."""
        version, bits = config.get("version") or config.get("format") or "gemm", config.get("bits", config.get("w_bit"))
        if not isinstance(version, str) or version.lower() != "gemm" or bits != _BITS:
            raise CheckpointError(f"{where}: AWQ {version!r} of {bits} bits is not known; convert it to gemm of 4 bits")
        return AWQ()

    # ---------------------------------------------------------------- writing

    def refuses(self, weight: QuantTensor) -> str | None:
        """4-bit integers in groups as they come, with float16 scales, of outputs that fill words."""
        reason = plain_reason(weight, order=weight.spec.group is None, conv1d=True)
        reason = reason or integer_reason(weight, bits=(_BITS,), scales=("f16",))
        out_features = weight.stored_shape[0]
        return reason or (f"{out_features} outputs do not fill words of eight" if out_features % 8 else None)

    def nearest(self, weight: QuantTensor) -> tuple[WeightSpec, ActSpec]:
        """See `ptqc.codegen.dialect.Dialect`."""
        return nearest_integer(weight, (_BITS,), ("int",)), ActSpec()

    def write(self, weight: QuantTensor) -> Tails:
        """See `ptqc.codegen.dialect.Dialect`."""
        form = groupwise_of(weight)
        return {
            "qweight": _LAY.pack(form.codes, _BITS),
            "qzeros": _LAY.pack(form.zero, _BITS),
            "scales": form.scale.mT.contiguous(),
        }

    def settled(self, inventory: Inventory) -> "AWQ":
        """See `ptqc.codegen.dialect.Dialect`."""
        return self

    def config(self, inventory: Inventory) -> dict[str, Any]:
        """See `ptqc.codegen.dialect.Dialect`."""
        group = single("group size", {name: weight.spec.group or -1 for name, weight in inventory.weights.items()})
        return {
            "quant_method": "awq", "bits": _BITS, "group_size": group, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": list(inventory.floats) or None,
        }  # fmt: skip

    def notes(self, inventory: Inventory) -> Sequence[str]:
        """See `ptqc.codegen.dialect.Dialect`."""
        return conv1d_notes(inventory)

    # ---------------------------------------------------------------- reading

    def describe(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        qweight, qzeros, scales = needed(entries, name, "qweight", "qzeros", "scales")
        if any(entry.dtype != torch.int32 or len(entry.shape) != 2 for entry in (qweight, qzeros)):
            raise damaged(name, "qweight and qzeros are matrices of int32")
        (in_features, words), columns = qweight.shape, qzeros.shape[0]
        if qzeros.shape[1] != words or scales.shape != (columns, words * 8):
            raise damaged(name, f"qzeros {qzeros.shape} and scales {scales.shape} do not fit qweight {qweight.shape}")
        scale = ScaleSpec(dtype=scale_dtype_name(name, scales.dtype))
        spec = WeightSpec(bits=_BITS, group=groups_of(in_features, columns, name), zero="int", scale=scale)
        return describe_or_refuse(name, spec, (words * 8, in_features), dtype)

    def read(self, weight: QuantTensor, entries: Entries) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        out_features, in_features = weight.stored_shape
        scale = entries["scales"].read().mT
        codes = _LAY.unpack(entries["qweight"].read(), _BITS, (out_features, in_features))
        zero = _LAY.unpack(entries["qzeros"].read(), _BITS, (out_features, scale.shape[1]))
        return weight_of(Groupwise(codes, scale, zero, torch.arange(0)), weight)
