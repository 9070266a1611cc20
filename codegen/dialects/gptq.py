"""GPTQ, as GPTQModel, AutoGPTQ, optimum and vLLM store it.

    qweight   int32 [in * bits / 32, out]      codes along `in`
    qzeros    int32 [groups, out * bits / 32]  zeros along `out`; checkpoint_format "gptq" stores zero - 1
    scales    float16 [groups, out]
    g_idx     int32 [in]                       the group of each input: all that tells of act-order

W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = g_idx[i]. Symmetric weights have the zero 2^(bits-1).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

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
)
from ptqc.codegen.words import Groupwise, Lay, groups_of, groupwise_of, integer_reason, order_of, weight_of
from ptqc.errors import CheckpointError, ExportError
from ptqc.qtensor import QuantTensor
from ptqc.spec import ScaleSpec, WeightSpec

__all__ = ["GPTQ"]

_BITS = (2, 3, 4, 8)
_CODES = Lay("columns", turned=True)
_ZEROS = Lay("out", turned=True)

Version = Literal["gptq", "gptq_v2"]
_VERSIONS: tuple[Version, ...] = ("gptq", "gptq_v2")


@DIALECTS.register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """Writes and reads GPTQ.

    version: the `checkpoint_format`. By default "gptq" for symmetric weights, and "gptq_v2" if there are zero points,
    since "gptq" has no place for a zero point of 0. bits: of a folder that is read.
    """

    version: Version | None = None
    bits: int | None = None

    example: ClassVar[str] = "int4g128"
    tails: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    markers: ClassVar[tuple[str, ...]] = ("qweight",)

    def __post_init__(self) -> None:
        if self.version not in (None, "gptq", "gptq_v2"):
            raise ExportError(f"gptq has no version {self.version!r}; use gptq or gptq_v2")

    @staticmethod
    def of_config(config: Mapping[str, Any], where: str) -> "GPTQ":
        """See `ptqc.codegen.dialect.Dialect`."""
        version, bits = config.get("checkpoint_format") or config.get("format") or "gptq", config.get("bits")
        known = next((name for name in _VERSIONS if name == version), None)
        if known is None or config.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(f"{where}: the GPTQ format {version!r} is not known; convert it to gptq or gptq_v2")
        return GPTQ(known, bits if type(bits) is int else None)

    # ---------------------------------------------------------------- writing

    def refuses(self, weight: QuantTensor) -> str | None:
        """Integers of 2, 3, 4 or 8 bits with float16 scales, in sizes that fill words."""
        reason = plain_reason(weight, order=True, conv1d=True) or integer_reason(weight, bits=_BITS, scales=("f16",))
        if reason is not None:
            return reason
        odd = [size for size in weight.stored_shape if size * weight.spec.bits % 32]
        return f"{odd[0]} codes of {weight.spec.bits} bits do not fill words of 32" if odd else None

    def nearest(self, weight: QuantTensor) -> tuple[WeightSpec, ActSpec]:
        """See `ptqc.codegen.dialect.Dialect`."""
        return nearest_integer(weight, _BITS), ActSpec()

    def write(self, weight: QuantTensor) -> Tails:
        """See `ptqc.codegen.dialect.Dialect`."""
        form, bits = groupwise_of(weight), weight.spec.bits
        return {
            "qweight": _CODES.pack(form.codes, bits),
            "qzeros": _ZEROS.pack(self._stored_zeros(form.zero, bits), bits),
            "scales": form.scale.mT.contiguous(),
            "g_idx": form.group_of,
        }

    def _stored_zeros(self, zero: Tensor, bits: int) -> Tensor:
        if self.version == "gptq_v2":
            return zero
        if not zero.is_meta and bool((zero == 0).any()):
            raise ExportError('the version "gptq" has no place for zero points of 0; use version="gptq_v2"')
        return zero - 1

    def settled(self, inventory: Inventory) -> "GPTQ":
        """See `ptqc.codegen.dialect.Dialect`."""
        is_symmetric = all(weight.spec.is_symmetric for weight in inventory.weights.values())
        return replace(self, version=self.version or ("gptq" if is_symmetric else "gptq_v2"))

    def config(self, inventory: Inventory) -> dict[str, Any]:
        """One description for most weights, and `dynamic` rules for the others, as GPTQModel and vLLM read them."""
        rows = {name.removesuffix(".weight"): _row(weight) for name, weight in inventory.weights.items()}
        usual = Counter(tuple(row.items()) for row in rows.values()).most_common(1)[0][0]
        config: dict[str, Any] = {
            "quant_method": "gptq", **dict(usual), "desc_act": any(row["desc_act"] for row in rows.values()),
            "lm_head": "lm_head" in rows, "true_sequential": True, "damp_percent": 0.01,
            "checkpoint_format": self.version, "pack_dtype": "int32", "meta": {"quantizer": ["ptqc"]},
        }  # fmt: skip
        own = {f"+:^{_quoted(name)}$": row for name, row in rows.items() if tuple(row.items()) != usual}
        blocks = {_block(name) for name in rows}
        inside = [name for name in inventory.floats if _block(name) in blocks]
        if own or inside:
            config["dynamic"] = own | {f"-:^{_quoted(name)}$": {} for name in inside}
        if inside:  # what optimum reads instead: endings of the names of modules in blocks
            endings = dict.fromkeys(name.removeprefix(_block(name)) for name in rows)
            is_clear = not any(name.endswith(tuple(endings)) for name in inside)
            config["modules_in_block_to_quantize"] = [list(endings) if is_clear else list(rows)]
        return config

    def notes(self, inventory: Inventory) -> Sequence[str]:
        """See `ptqc.codegen.dialect.Dialect`."""
        mixed = len({str(weight.spec) for weight in inventory.weights.values()}) > 1
        several = ("several specs: GPTQModel and vLLM read them (dynamic), transformers does not",) if mixed else ()
        return (*several, *conv1d_notes(inventory))

    # ---------------------------------------------------------------- reading

    def describe(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        qweight, qzeros, scales = needed(entries, name, "qweight", "qzeros", "scales")
        if any(entry.dtype != torch.int32 or len(entry.shape) != 2 for entry in (qweight, qzeros)):
            raise damaged(name, "qweight and qzeros are matrices of int32")
        (words, out_features), columns = qweight.shape, scales.shape[0] if scales.shape else 0
        g_idx = entries.get("g_idx")
        bits, in_features = _sizes(name, words, None if g_idx is None else g_idx.shape, self.bits)
        group = groups_of(in_features, columns, name)
        if qzeros.shape != (columns, -(-out_features * bits // 32)) or scales.shape != (columns, out_features):
            raise damaged(name, f"qzeros {qzeros.shape} and scales {scales.shape} do not fit {out_features} outputs")
        zeros = self._zeros(qzeros.read(), bits, (out_features, columns))
        around = order_of(g_idx.read() if g_idx is not None else torch.arange(in_features) // (group or in_features),
                          columns, name)  # fmt: skip
        spec = WeightSpec(
            bits=bits, group=group, zero="none" if bool((zeros == 2 ** (bits - 1)).all()) else "int",
            scale=ScaleSpec(dtype=scale_dtype_name(name, scales.dtype)),
        )  # fmt: skip
        return describe_or_refuse(name, spec, (out_features, in_features), dtype, around)

    def _zeros(self, words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
        if self.version == "gptq_v2":
            return _ZEROS.unpack(words, bits, shape)
        if bits == 3:
            return _ZEROS.unpack(words, bits, shape) + 1 & 7
        # GPTQModel subtracts 1 from all zeros of a word at once: a zero of 0 borrows from its neighbour.
        ones = sum(1 << bits * k for k in range(32 // bits))
        return _ZEROS.unpack((words.long() + ones).to(torch.int32), bits, shape)

    def read(self, weight: QuantTensor, entries: Entries) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        bits, shape = weight.spec.bits, (weight.stored_shape[0], weight.stored_shape[1])
        scale = entries["scales"].read().mT
        codes = _CODES.unpack(entries["qweight"].read(), bits, shape)
        zero = self._zeros(entries["qzeros"].read(), bits, (shape[0], scale.shape[1]))
        group_of = entries["g_idx"].read() if "g_idx" in entries else torch.arange(0)
        return weight_of(Groupwise(codes, scale, zero, group_of), weight)


def _row(weight: QuantTensor) -> dict[str, Any]:
    spec = weight.spec
    order = weight.surroundings.order and spec.group is not None
    return {"bits": spec.bits, "group_size": spec.group or -1, "sym": spec.is_symmetric, "desc_act": order}


def _sizes(name: str, words: int, groups: tuple[int, ...] | None, bits: int | None) -> tuple[int, int]:
    """Bits and inputs, from the words of a column, the shape of g_idx and what the config says."""
    if groups is not None and (len(groups) != 1 or not groups[0]):
        raise damaged(name, f"g_idx has the shape {groups}")
    in_features = groups[0] if groups else words * 32 // (bits or 1)
    found = next((known for known in _BITS if -(-in_features * known // 32) == words), None)
    if found is None or (groups is None and bits != found):
        raise damaged(name, f"{words} words hold no {in_features} codes of {', '.join(map(str, _BITS))} bits")
    return found, in_features


def _block(name: str) -> str:
    """The name of the block that a module is in: up to its first number."""
    words = name.split(".")
    number = next((place for place, word in enumerate(words) if word.isdigit()), None)
    return "" if number is None else ".".join(words[: number + 1]) + "."


def _quoted(name: str) -> str:
    return name.replace(".", r"\.")
