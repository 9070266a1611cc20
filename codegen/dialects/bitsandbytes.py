"""bitsandbytes: NormalFloat and 4-bit floats, and the int8 of LLM.int8, as transformers stores them.

    4 bits    weight                uint8 [out * in / 2, 1]  codes, row after row, first in the high half
              weight.absmax         float32 [blocks], largest magnitude of each block of `blocksize` codes
              weight.quant_map      float32 [16], the levels
              weight.quant_state.bitsandbytes__nf4 (or __fp4)  uint8, a JSON text: quant_type, blocksize, dtype, shape
    nested    weight.absmax         uint8 [blocks], codes in the dynamic map
              weight.nested_absmax  float32 [blocks / 256]
              weight.nested_quant_map  float32 [256]; the JSON has nested_offset, their mean
    8 bits    weight                int8 [out, in]
              SCB                   float32 [out], largest magnitude of each row; W = weight * SCB / 127
              weight_format         uint8 [], 0

There is one type for all weights of a folder, and 8 bits always quantize their inputs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.codebooks import codebook, dynamic_map
from ptqc.codegen.dialect import (
    DIALECTS,
    Entries,
    Inventory,
    Tails,
    damaged,
    describe_or_refuse,
    needed,
    plain_reason,
    single,
)
from ptqc.errors import CheckpointError
from ptqc.qtensor import QuantTensor
from ptqc.spec import DOUBLE_QUANT, ScaleSpec, WeightSpec
from ptqc.surroundings import Surroundings

__all__ = ["BitsAndBytes"]

_STATE = "weight.quant_state.bitsandbytes__"
_BOOKS = ("nf4", "fp4")
_BLOCKS = tuple(2**power for power in range(5, 13))
_STATE_BYTES = 512
_INT8 = WeightSpec.parse("int8")
_THRESHOLD = 6.0


@DIALECTS.register("bitsandbytes")
@dataclass(frozen=True)
class BitsAndBytes:
    """Writes and reads bitsandbytes. threshold: of the outliers of all inputs of 8-bit weights; 0 is none."""

    threshold: float = _THRESHOLD

    example: ClassVar[str] = "nf4g64"
    tails: ClassVar[tuple[str, ...]] = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", "SCB",
        "weight_format", *(f"{_STATE}{book}" for book in _BOOKS),
    )  # fmt: skip
    markers: ClassVar[tuple[str, ...]] = ("SCB", *(f"{_STATE}{book}" for book in _BOOKS))

    @staticmethod
    def of_config(config: Mapping[str, Any], where: str) -> "BitsAndBytes":
        """See `ptqc.codegen.dialect.Dialect`."""
        threshold = config.get("llm_int8_threshold", _THRESHOLD)
        if type(threshold) not in (int, float) or not 0 <= threshold < 1e30:
            raise CheckpointError(f"{where}: llm_int8_threshold is {threshold!r}, no threshold; repair it")
        return BitsAndBytes(float(threshold))

    # ---------------------------------------------------------------- writing

    def refuses(self, weight: QuantTensor) -> str | None:
        """nf4 and fp4 in blocks, plain or nested; int8 per row whose inputs are int8 with outliers."""
        if _is_int8(weight.spec):
            own = weight.surroundings.act
            acts = (self._act, *([own] if _is_llm_int8(own) else []))
            return plain_reason(weight, order=False, acts=acts, conv1d=True)
        spec, block = weight.spec, weight.spec.group or weight.stored_shape[-1]
        reason = plain_reason(weight, order=False, conv1d=True)
        if reason is not None or (spec.codebook in _BOOKS and spec.scale in (DOUBLE_QUANT, ScaleSpec(dtype="f32"))
                                  and spec.rows == 1 and block in _BLOCKS):  # fmt: skip
            return reason
        return f"{spec} is neither nf4 nor fp4 in blocks of 32 to 4096, nor int8 with inputs in {self._act}"

    @property
    def _act(self) -> ActSpec:
        return ActSpec(dtype="int8", outlier=self.threshold or None)

    def nearest(self, weight: QuantTensor) -> tuple[WeightSpec, ActSpec]:
        """See `ptqc.codegen.dialect.Dialect`."""
        spec = weight.spec
        if spec.bits / spec.vector > 6:
            return _INT8, self._act
        block = min(_BLOCKS, key=lambda known: abs(known - (spec.group or 64)))
        wanted = WeightSpec.parse(f"{spec.codebook if spec.codebook in _BOOKS else 'nf4'}g{block}")
        return wanted.fit(weight.stored_shape), ActSpec()

    def write(self, weight: QuantTensor) -> Tails:
        """See `ptqc.codegen.dialect.Dialect`."""
        parts, spec = weight.parts, weight.spec
        if _is_int8(spec):
            return {
                "weight": (parts["codes"] ^ 0x80).view(torch.int8),
                "SCB": parts["scale"].float().flatten() * 127,
                "weight_format": torch.zeros((), dtype=torch.uint8, device=parts["codes"].device),
            }
        book = codebook(str(spec.codebook))
        tails = {
            "weight": _swapped(parts["codes"]).reshape(-1, 1),
            "weight.absmax": parts["scale"].flatten(),
            "weight.quant_map": book.table(parts["codes"].device),
        }
        state: dict[str, Any] = {
            "quant_type": book.name, "blocksize": spec.group or weight.stored_shape[-1],
            "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.stored_shape),
        }  # fmt: skip
        if spec.scale == DOUBLE_QUANT:
            offset = parts["scale_offset"]
            tails["weight.nested_absmax"] = parts["scale_outer"]
            tails["weight.nested_quant_map"] = dynamic_map().to(offset.device)
            state |= {"nested_blocksize": spec.scale.block, "nested_dtype": "float32",
                      "nested_offset": 0.0 if offset.is_meta else offset.item()}  # fmt: skip
        tails[f"{_STATE}{book.name}"] = _state_bytes(state, parts["codes"].device)
        return tails

    def settled(self, inventory: Inventory) -> "BitsAndBytes":
        """See `ptqc.codegen.dialect.Dialect`."""
        thresholds = {
            name: weight.surroundings.act.outlier or 0.0
            for name, weight in inventory.weights.items()
            if _is_int8(weight.spec)
        }
        return BitsAndBytes(single("threshold of outliers", thresholds)) if thresholds else self

    def config(self, inventory: Inventory) -> dict[str, Any]:
        """See `ptqc.codegen.dialect.Dialect`."""
        weights = inventory.weights
        is_int8 = single("width", {name: 8 if _is_int8(weight.spec) else 4 for name, weight in weights.items()}) == 8
        common = {
            "quant_method": "bitsandbytes", "load_in_4bit": not is_int8, "load_in_8bit": is_int8,
            "_load_in_4bit": not is_int8, "_load_in_8bit": is_int8, "llm_int8_skip_modules": list(inventory.floats),
            "llm_int8_threshold": self.threshold, "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }  # fmt: skip
        if is_int8:
            return common
        dtype = single("dtype", {name: weight.dtype for name, weight in weights.items()})
        return common | {
            "bnb_4bit_quant_type": single("codebook", {name: str(w.spec.codebook) for name, w in weights.items()}),
            "bnb_4bit_use_double_quant": single(
                "kind of scales (nested or not)", {name: w.spec.scale == DOUBLE_QUANT for name, w in weights.items()}
            ),
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }

    def notes(self, inventory: Inventory) -> Sequence[str]:
        """See `ptqc.codegen.dialect.Dialect`."""
        return ()

    # ---------------------------------------------------------------- reading

    def describe(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        if "SCB" in entries:
            return self._describe_int8(name, entries, dtype)
        book = next(known for known in _BOOKS if f"{_STATE}{known}" in entries)
        codes, absmax, levels = needed(entries, name, "weight", "weight.absmax", "weight.quant_map")
        state = _read_state(name, entries, book)
        shape, block = state.get("shape"), state.get("blocksize")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise damaged(name, f"its quant_state has the shape {shape!r}, no matrix")
        if type(block) is not int or block not in _BLOCKS:
            raise damaged(
                name, f"its quant_state has the blocksize {block!r}; known are {', '.join(map(str, _BLOCKS))}"
            )
        if shape[1] % block:
            raise damaged(name, f"blocks of {block} cross the rows of {shape[1]} inputs; quantize it with smaller ones")
        is_nested = "nested_offset" in state
        spec = WeightSpec.parse(f"{book}{'' if block == shape[1] else f'g{block}'}{'dq' if is_nested else ''}")
        numbers = shape[0] * shape[1]
        wanted = {
            "weight": (codes, numbers // 2, torch.uint8),
            "weight.absmax": (absmax, numbers // block, torch.uint8 if is_nested else torch.float32),
            "weight.quant_map": (levels, 16, torch.float32),
        }
        if is_nested:
            outer, nested_map = needed(entries, name, "weight.nested_absmax", "weight.nested_quant_map")
            blocks = -(-(numbers // block) // (DOUBLE_QUANT.block or 1))
            wanted["weight.nested_absmax"] = (outer, blocks, torch.float32)
            wanted["weight.nested_quant_map"] = (nested_map, 256, torch.float32)
        for tail, (entry, count, kind) in wanted.items():
            if entry.dtype != kind or _count(entry.shape) != count:
                raise damaged(name, f"{tail} is {entry.dtype} {list(entry.shape)}, not {count} of {kind}")
        _check_map(name, levels.read(), codebook(book).table())
        if is_nested:
            _check_map(name, wanted["weight.nested_quant_map"][0].read(), dynamic_map())
            if state.get("nested_blocksize") != DOUBLE_QUANT.block or type(state["nested_offset"]) not in (int, float):
                raise damaged(name, "its nested scales are not in blocks of 256 around a number")
        return describe_or_refuse(name, spec, shape, dtype)

    def _describe_int8(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        codes, scale = needed(entries, name, "weight", "SCB")
        if codes.dtype != torch.int8 or len(codes.shape) != 2 or scale.shape != codes.shape[:1]:
            raise damaged(name, f"weight is {codes.dtype} {list(codes.shape)} and SCB {list(scale.shape)}")
        if not scale.dtype.is_floating_point:
            raise damaged(name, f"SCB is {scale.dtype}")
        form = entries.get("weight_format")
        if form is not None and (form.shape not in ((), (1,)) or int(form.read().flatten()[0]) != 0):
            raise damaged(name, "its weight_format is not the one of rows (0)")
        around = Surroundings(act=self._act)
        return describe_or_refuse(name, _INT8.with_scale_dtype("f32"), codes.shape, dtype, around)

    def read(self, weight: QuantTensor, entries: Entries) -> QuantTensor:
        """See `ptqc.codegen.dialect.Dialect`."""
        layout = weight.parts
        if _is_int8(weight.spec):
            codes = entries["weight"].read().view(torch.uint8) ^ 0x80
            scale = entries["SCB"].read().float() / 127
            return weight.with_parts({"codes": codes, "scale": scale.reshape(layout["scale"].shape)})
        parts = {
            "codes": _swapped(entries["weight"].read().reshape(layout["codes"].shape)),
            "scale": entries["weight.absmax"].read().reshape(layout["scale"].shape),
        }
        if weight.spec.scale == DOUBLE_QUANT:
            state = _read_state("weight", entries, str(weight.spec.codebook))
            parts["scale_outer"] = entries["weight.nested_absmax"].read().flatten()
            parts["scale_offset"] = torch.tensor(float(state["nested_offset"]))
        return weight.with_parts(parts)


def _is_int8(spec: WeightSpec) -> bool:
    return spec.with_scale_dtype("f16") == _INT8 and spec.scale.bits is None


def _is_llm_int8(act: ActSpec) -> bool:
    return act.dtype == "int8" and act.scale == "token"


def _swapped(codes: Tensor) -> Tensor:
    """The halves of each byte exchanged."""
    return codes << 4 | codes >> 4


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _state_bytes(state: Mapping[str, Any], device: torch.device) -> Tensor:
    """The JSON text as bytes, filled up with spaces: its length must not depend on values."""
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    return torch.tensor(list(text), dtype=torch.uint8, device=device)


def _read_state(name: str, entries: Entries, book: str) -> dict[str, Any]:
    entry = entries[f"{_STATE}{book}"]
    if entry.dtype != torch.uint8 or len(entry.shape) != 1 or entry.shape[0] > 100_000:
        raise damaged(name, f"its quant_state is {entry.dtype} {list(entry.shape)}, no text")
    try:
        state = json.loads(bytes(entry.read().tolist()).decode())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or state.get("quant_type") != book:
        raise damaged(name, f"its quant_state is no JSON text about {book}")
    return state


def _check_map(name: str, found: Tensor, known: Tensor) -> None:
    if not torch.allclose(found.flatten(), known, rtol=1e-4, atol=1e-6):
        raise damaged(name, "its table of levels is not the one of its type")
