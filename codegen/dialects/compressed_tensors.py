"""compressed-tensors, as llm-compressor writes and vLLM and transformers read it.

    pack-quantized        weight_packed      int32 [out, ceil(in * bits / 32)]      codes along `in`
                          weight_scale       [out, groups]
                          weight_zero_point  int32 [ceil(out * bits / 32), groups]  zeros along `out`, if there are any
                          weight_shape       int64 [2]
                          weight_g_idx       int32 [in]    groups of inputs; releases of 2026 removed it, vLLM has it
    int-quantized         weight             int8 [out, in]
    float-quantized       weight             float8 e4m3 [out, in]
                          weight_scale       [1] | [out, groups] | [blocks of rows, blocks of columns]
    mxfp4-pack-quantized  weight_packed      uint8 [out, in / 2], first in the low half
                          weight_scale       uint8 [out, in / 32], exponents + 127
    static inputs         input_scale        float32 [1]

`quantization_config` has one entry in `config_groups` for each kind of weight: its targets, and how weights and inputs
are quantized.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.codegen.dialect import (
    DIALECTS,
    Entries,
    Entry,
    Inventory,
    Tails,
    damaged,
    describe_or_refuse,
    nearest_integer,
    needed,
    plain_reason,
    scale_dtype_name,
)
from ptqc.codegen.schemes import ActTargets, act_form, read_acts, weight_form
from ptqc.codegen.words import Groupwise, Lay, groups_of, groupwise_of, integer_reason, order_of, weight_of
from ptqc.errors import CheckpointError
from ptqc.qtensor import QuantTensor
from ptqc.spec import KNOWN_SPECS, ScaleSpec, WeightSpec
from ptqc.surroundings import Surroundings

__all__ = ["CompressedTensors"]

_CODES = Lay("columns")
_ZEROS = Lay("out")
_PACKED, _INT, _FLOAT, _MX = "pack-quantized", "int-quantized", "float-quantized", "mxfp4-pack-quantized"
_KNOWN_FORMATS = (_PACKED, _INT, _FLOAT, _MX, "naive-quantized", "mixed-precision", "dense")
_PLAIN = ("f16", "bf16", "f32")
_BITS = (2, 3, 4, 5, 6, 7, 8)
_E4M3, _MXFP4 = "fp8e4m3", KNOWN_SPECS["mxfp4"]
_INPUTS: dict[str, tuple[ActSpec, ...]] = {
    _PACKED: (ActSpec(),),
    _INT: (ActSpec(dtype="int8"), ActSpec(dtype="int8", scale="tensor", is_static=True)),
    _FLOAT: (ActSpec(), ActSpec(dtype="fp8e4m3"), ActSpec(dtype="fp8e4m3", scale="tensor", is_static=True)),
    _MX: (ActSpec(),),
}
"""What may happen to the inputs of a weight in each format."""


@DIALECTS.register("compressed_tensors")
@dataclass(frozen=True)
class CompressedTensors:
    """Writes and reads compressed-tensors.

    g_idx: store the groups of weights that were quantized in an order of their own (act-order) as weight_g_idx, for
    vLLM and compressed-tensors releases that still have it. acts: of a folder that is read.
    """

    g_idx: bool = False
    acts: tuple[ActTargets, ...] = ()

    example: ClassVar[str] = "int4g128"
    tails: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
        "weight", "input_scale", "input_zero_point",
    )  # fmt: skip
    markers: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")

    @staticmethod
    def of_config(config: Mapping[str, Any], where: str) -> "CompressedTensors":
        """See `ptqc.codegen.dialect.Dialect`."""
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
            raise CheckpointError(f"{where}: config_groups of quantization_config is no table of tables; save it again")
        formats = {str(form) for form in (config.get("format"), *(g.get("format") for g in groups.values())) if form}
        unknown = sorted(formats.difference(_KNOWN_FORMATS))
        if unknown:
            known = ", ".join(_KNOWN_FORMATS)
            raise CheckpointError(f"{where}: the compressed-tensors format {unknown[0]} is not known; known: {known}")
        return CompressedTensors(acts=read_acts(list(groups.values()), where))

    # ---------------------------------------------------------------- writing

    def refuses(self, weight: QuantTensor) -> str | None:
        """Integers of 2 to 8 bits; with 8-bit inputs `int8`; float8 e4m3; mxfp4."""
        form, spec = _format_of(weight), weight.spec
        has_order = form == _PACKED and (self.g_idx or spec.group is None)
        reason = plain_reason(weight, order=has_order, acts=_INPUTS[form])
        if reason is not None and weight.surroundings.order and not has_order and form == _PACKED:
            return f"{reason} since compressed-tensors dropped weight_g_idx (option g_idx=True: vLLM still reads it)"
        if reason is not None or form == _MX:
            return reason
        if form == _FLOAT:
            return None if spec.scale.bits is None and spec.scale.dtype in _PLAIN else f"{spec} has no plain scales"
        if form == _INT and (spec.zero != "none" or spec.bits != 8):
            return f"8-bit inputs need weights in int8, not {spec}"
        return integer_reason(weight, bits=_BITS, scales=_PLAIN)

    def nearest(self, weight: QuantTensor) -> tuple[WeightSpec, ActSpec]:
        """See `ptqc.codegen.dialect.Dialect`."""
        book, act = weight.spec.book, weight.surroundings.act
        if book is not None and book.float_dtype is not None:
            return WeightSpec.parse(_E4M3), act if act in _INPUTS[_FLOAT] else ActSpec()
        if act in _INPUTS[_INT]:
            return nearest_integer(weight, (8,), ("none",)), act
        return nearest_integer(weight, _BITS), ActSpec()

    def write(self, weight: QuantTensor) -> Tails:
        """See `ptqc.codegen.dialect.Dialect`."""
        tails = _WRITERS[_format_of(weight)](weight)
        if weight.surroundings.order and weight.spec.group is not None:
            tails["weight_g_idx"] = groupwise_of(weight).group_of
        if weight.surroundings.act.is_static:
            tails["input_scale"] = weight.extras["act_scale"].reshape(1)
        return tails

    def settled(self, inventory: Inventory) -> "CompressedTensors":
        """See `ptqc.codegen.dialect.Dialect`."""
        return self

    def config(self, inventory: Inventory) -> dict[str, Any]:
        """See `ptqc.codegen.dialect.Dialect`."""
        kinds: dict[tuple[str, WeightSpec, ActSpec, bool], list[str]] = {}
        for name, weight in inventory.weights.items():
            has_order = weight.surroundings.order and weight.spec.group is not None
            kind = (_format_of(weight), weight.spec, weight.surroundings.act, has_order)
            kinds.setdefault(kind, []).append(name.removesuffix(".weight"))
        formats = list(dict.fromkeys(form for form, *_ in kinds))
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(kinds) == 1 else names,
                "weights": weight_form(spec, has_order),
                "input_activations": act_form(act),
                "output_activations": None,
                "format": form,
            }
            for number, ((form, spec, act, has_order), names) in enumerate(kinds.items())
        }
        return {
            "quant_method": "compressed-tensors", "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed", "global_compression_ratio": None, "kv_cache_scheme": None,
            "ignore": list(inventory.floats), "config_groups": groups,
        }  # fmt: skip

    def notes(self, inventory: Inventory) -> Sequence[str]:
        """See `ptqc.codegen.dialect.Dialect`."""
        acts = {weight.surroundings.act for weight in inventory.weights.values()}
        notes = []
        if ActSpec(dtype="int8") in acts:
            notes.append("inputs: the compressed-tensors package simulates int8 with steps of max / 127.5, "
                         "vLLM computes with max / 127 as ptqc does")  # fmt: skip
        if any(weight.spec.zero == "int" for weight in inventory.weights.values()):
            notes.append("zero points: transformers 5.23 with compressed-tensors 0.20 loads them only with "
                         "CompressedTensorsConfig(dequantize=True)")  # fmt: skip
        return notes

    # ---------------------------------------------------------------- reading

    def describe(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        if "weight_packed" in entries:
            packed, scale = needed(entries, name, "weight_packed", "weight_scale")
            is_float = packed.dtype == torch.uint8
            return _describe_mx(name, entries, dtype) if is_float else self._describe_packed(name, entries, dtype)
        weight, scale = needed(entries, name, "weight", "weight_scale")
        act = next((known.act for known in self.acts if known.has(name.removesuffix(".weight"))), ActSpec())
        if act.is_static and "input_scale" not in entries:
            raise damaged(name, "its inputs have a static scale, but there is no input_scale")
        if weight.dtype not in (torch.int8, torch.float8_e4m3fn) or len(weight.shape) != 2:
            raise damaged(name, f"weight is {weight.dtype} {list(weight.shape)}, no matrix of int8 or float8 e4m3")
        if "weight_zero_point" in entries and bool(entries["weight_zero_point"].read().float().any()):
            raise damaged(name, "8-bit codes with zero points are not known")
        base = "int8" if weight.dtype == torch.int8 else _E4M3
        spec = _spec_of_grid(name, base, weight.shape, scale)
        return describe_or_refuse(name, spec, weight.shape, dtype, Surroundings(act=act))

    def _describe_packed(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        packed, scale, shape_entry = needed(entries, name, "weight_packed", "weight_scale", "weight_shape")
        is_pair = shape_entry.shape == (2,) and shape_entry.dtype in (torch.int32, torch.int64)
        shape = tuple(shape_entry.read().tolist()) if is_pair else ()
        if packed.dtype != torch.int32 or len(packed.shape) != 2 or len(shape) != 2 or len(scale.shape) != 2:
            raise damaged(name, "weight_packed and weight_scale are no matrices with a weight_shape of two numbers")
        (out_features, in_features), (rows, words) = shape, packed.shape
        bits = next((known for known in _BITS if in_features > 0 and -(-in_features * known // 32) == words), None)
        if out_features != rows or scale.shape[0] != rows or bits is None:
            raise damaged(name, f"weight_packed {packed.shape} and weight_scale {scale.shape} hold no {shape} weight")
        columns = scale.shape[1]
        group = groups_of(in_features, columns, name)
        zero = entries.get("weight_zero_point")
        if zero is not None and (zero.shape != (-(-rows * bits // 32), columns) or zero.dtype != torch.int32):
            raise damaged(name, f"weight_zero_point is {zero.dtype} {zero.shape}")
        g_idx = entries.get("weight_g_idx")
        group_of = torch.arange(in_features) // (group or in_features) if g_idx is None else g_idx.read()
        if group_of.shape != (in_features,) or group_of.is_floating_point():
            raise damaged(name, f"weight_g_idx is {group_of.dtype} {list(group_of.shape)}")
        spec = WeightSpec(
            bits=bits, group=group, zero="none" if zero is None else "int",
            scale=ScaleSpec(dtype=scale_dtype_name(name, scale.dtype)),
        )  # fmt: skip
        return describe_or_refuse(name, spec, (rows, in_features), dtype, order_of(group_of, columns, name))

    def read(self, weight: QuantTensor, entries: Entries) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        if weight.spec == _MXFP4:
            scale = entries["weight_scale"].read().view(torch.float8_e8m0fnu)
            return weight.with_parts({"codes": entries["weight_packed"].read(), "scale": scale})
        if weight.spec.packing == "float" or "weight" in entries:
            return _read_plain(weight, entries)
        (out_features, in_features), bits = weight.stored_shape, weight.spec.bits
        scale = entries["weight_scale"].read()
        codes = _CODES.unpack(entries["weight_packed"].read(), bits, (out_features, in_features))
        zero = torch.zeros(0, dtype=torch.uint8)
        if weight.spec.zero == "int":
            zero = _ZEROS.unpack(entries["weight_zero_point"].read(), bits, (out_features, scale.shape[1]))
        group_of = entries["weight_g_idx"].read() if "weight_g_idx" in entries else torch.arange(0)
        return weight_of(Groupwise(codes, scale, zero, group_of), weight)


def _format_of(weight: QuantTensor) -> str:
    """The format for a weight; pack-quantized also for those that none holds."""
    spec, act = weight.spec, weight.surroundings.act
    if spec.codebook == _E4M3:
        return _FLOAT
    if spec == _MXFP4:
        return _MX
    return _INT if spec.codebook is None and act.dtype == "int8" else _PACKED


def _packed(weight: QuantTensor) -> Tails:
    form, bits = groupwise_of(weight), weight.spec.bits
    tails = {
        "weight_packed": _CODES.pack(form.codes, bits),
        "weight_scale": form.scale.contiguous(),
        "weight_shape": torch.tensor(weight.stored_shape, device=form.codes.device),
    }
    return tails | ({"weight_zero_point": _ZEROS.pack(form.zero, bits)} if weight.spec.zero == "int" else {})


def _plain(weight: QuantTensor) -> Tails:
    parts, spec = weight.parts, weight.spec
    codes = parts["codes"] if spec.packing == "float" else (parts["codes"] ^ 0x80).view(torch.int8)
    is_one = spec.rows is None and spec.group is None
    return {"weight": codes, "weight_scale": parts["scale"].reshape(1) if is_one else parts["scale"]}


def _microscaled(weight: QuantTensor) -> Tails:
    return {"weight_packed": weight.parts["codes"], "weight_scale": weight.parts["scale"].view(torch.uint8)}


_WRITERS = {_PACKED: _packed, _INT: _plain, _FLOAT: _plain, _MX: _microscaled}


def _read_plain(weight: QuantTensor, entries: Entries) -> QuantTensor:
    codes = entries["weight"].read()
    codes = codes if weight.spec.packing == "float" else codes.view(torch.uint8) ^ 0x80
    scale = entries["weight_scale"].read().reshape(weight.parts["scale"].shape)
    extras: dict[str, Tensor] = {}
    if weight.surroundings.act.is_static:
        extras["act_scale"] = entries["input_scale"].read().float().amax()
    return weight.with_parts({"codes": codes, "scale": scale}, extras=extras)


def _describe_mx(name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
    packed, scale = needed(entries, name, "weight_packed", "weight_scale")
    if "weight_global_scale" in entries or scale.dtype != torch.uint8:
        raise damaged(name, "of 4-bit floats only mxfp4 is known, whose scales are exponents in uint8")
    if len(packed.shape) != 2 or scale.shape != (packed.shape[0], packed.shape[1] // 16) or packed.shape[1] % 16:
        raise damaged(name, f"weight_packed {packed.shape} and weight_scale {scale.shape} are no mxfp4")
    return describe_or_refuse(name, _MXFP4, (packed.shape[0], packed.shape[1] * 2), dtype)


def _spec_of_grid(name: str, base: str, shape: tuple[int, ...], scale: Entry) -> WeightSpec:
    """The spec whose scales have the shape of those in the file."""
    (out_features, in_features), grid = shape, scale.shape
    suffix = f"-{scale_dtype_name(name, scale.dtype)}"
    if grid in ((), (1,)) or grid == (1, 1) != (out_features, 1):
        return WeightSpec.parse(f"{base}t{suffix}")
    if len(grid) == 2 and grid[0] == out_features and grid[1] and in_features % grid[1] == 0:
        group = "" if grid[1] == 1 else f"g{in_features // grid[1]}"
        return WeightSpec.parse(f"{base}{group}{suffix}")
    block = 128  # the one block size in use
    if base == _E4M3 and grid == (-(-out_features // block), -(-in_features // block)):
        return WeightSpec.parse(f"{base}b{block}x{block}{suffix}")
    raise damaged(name, f"no grid of a {out_features} x {in_features} weight has scales of shape {list(grid)}")
