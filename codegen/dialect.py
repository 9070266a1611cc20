"""Dialects: what a way to store quantized weights in a model folder must provide.

A dialect is one file in `codegen/dialects/`: a frozen dataclass whose fields are its options, registered under the
`quant_method` that config.json gives it. It turns one weight into named tensors and back, and says what config.json
holds beside them; reading and writing folders is the business of `ptqc.folders.foreign` and `ptqc.folders.exporting`.

The tensors of the weight "layers.0.up.weight" are called "layers.0.up." and a *tail*: "qweight", "weight.absmax".
A weight that is only described is a QuantTensor on the meta device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ptqc import storage
from ptqc.act_spec import ActSpec
from ptqc.errors import CheckpointError, ExportError, SpecError
from ptqc.qtensor import QuantTensor
from ptqc.registry import Registry
from ptqc.spec import SCALE_DTYPES, WeightSpec, Zero
from ptqc.surroundings import Surroundings

__all__ = [
    "DIALECTS", "DamagedWeight", "Dialect", "Entries", "Entry", "Inventory", "Tails", "conv1d_notes", "damaged",
    "describe_or_refuse", "described", "nearest_integer", "needed", "plain_reason", "scale_dtype_name", "single",
    "stem_of",
]  # fmt: skip

T = TypeVar("T")

Tails = dict[str, Tensor]
"""The tensors of one weight by their tails."""


class Entry(Protocol):
    """A tensor in a file: its header, and how to read it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor:
        """The values."""
        ...


Entries = Mapping[str, Entry]
"""The tensors of one weight in a file, by their tails."""


@dataclass(frozen=True)
class Inventory:
    """The linear-like weights of a folder to write. weights: quantized, by parameter name, on the meta device.
    floats: names of the modules whose matrices stay in floating point, those of tied ones included."""

    weights: Mapping[str, QuantTensor]
    floats: Sequence[str]


class Dialect(Protocol):
    """A way to store quantized weights."""

    example: ClassVar[str]
    """A spec that it holds, for advice."""

    tails: ClassVar[tuple[str, ...]]
    """Every tail there is."""

    markers: ClassVar[tuple[str, ...]]
    """Tails of which a quantized weight has at least one, and a float weight none."""

    @staticmethod
    def of_config(config: Mapping[str, Any], where: str) -> "Dialect":
        """The dialect with the options that a `quantization_config` states.

        Raises: CheckpointError for a variant that is not known.
        """
        ...

    # ---------------------------------------------------------------- writing

    def refuses(self, weight: QuantTensor) -> str | None:
        """None if the weight, perhaps only described, can be stored without loss, else the reason."""
        ...

    def nearest(self, weight: QuantTensor) -> tuple[WeightSpec, ActSpec]:
        """The spec and the quantization of inputs that come closest to those of a weight that is refused."""
        ...

    def write(self, weight: QuantTensor) -> Tails:
        """The tensors of a weight that is not refused; of a described one, tensors on the meta device."""
        ...

    def settled(self, inventory: Inventory) -> "Dialect":
        """The dialect with options that were left open chosen for the weights of a folder."""
        ...

    def config(self, inventory: Inventory) -> dict[str, Any]:
        """The `quantization_config`.

        Raises: ExportError if the weights are too different for it to say.
        """
        ...

    def notes(self, inventory: Inventory) -> Sequence[str]:
        """What readers of the folder will do differently from ptqc."""
        ...

    # ---------------------------------------------------------------- reading

    def describe(self, name: str, entries: Entries, dtype: torch.dtype) -> QuantTensor:
        """The weight on the meta device, from headers and small tensors. dtype: what it pretends to be.

        Raises: CheckpointError if the tensors contradict each other.
        """
        ...

    def read(self, weight: QuantTensor, entries: Entries) -> QuantTensor:
        """The weight that `describe` described."""
        ...


DIALECTS: Registry[type[Dialect]] = Registry("dialect", "ptqc.codegen.dialects")


def stem_of(name: str) -> str | None:
    """What the tensors of a parameter are called, up to the tail; None if it is no weight of a module."""
    return name.removesuffix("weight") if name == "weight" or name.endswith(".weight") else None


def described(
    spec: WeightSpec,
    shape: Sequence[int],
    dtype: torch.dtype,
    surroundings: Surroundings | None = None,
    is_transposed: bool = False,
) -> QuantTensor:
    """A weight without values. shape: [..., out, in].

    Raises: SpecError if the spec does not fit the shape.
    """
    surroundings = surroundings or Surroundings()
    layout = storage.part_layout(spec, shape)
    parts = {name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in layout.items()}
    extras = {
        name: torch.empty(size, dtype=kind, device="meta") for name, (size, kind) in surroundings.layout(shape).items()
    }
    return QuantTensor(parts, spec, shape, dtype, is_transposed, surroundings, extras)


def describe_or_refuse(
    name: str, spec: WeightSpec, shape: Sequence[int], dtype: torch.dtype, surroundings: Surroundings | None = None
) -> QuantTensor:
    """`described`, for weights in files. Raises: CheckpointError naming the weight."""
    try:
        return described(spec, shape, dtype, surroundings)
    except SpecError as error:
        raise damaged(name, str(error)) from None


def plain_reason(
    weight: QuantTensor, *, order: bool, acts: Sequence[ActSpec] = (ActSpec(),), conv1d: bool = False
) -> str | None:
    """Why a dialect of plain linear weights cannot hold what is around this one; None if it can.

    order: whether it can say in which order the inputs were quantized. acts: what it knows to do to inputs. conv1d:
    whether its readers look for stored weights in a Conv1D of transformers as well. All hold them [out, in].
    """
    around = weight.surroundings
    checks = {
        f"it has {weight.ndim} axes; only matrices have a name there": weight.ndim != 2,
        "it is the weight of a Conv1D; readers look for stored weights in linear modules only (those of gptq, "
        "awq and bitsandbytes also in a Conv1D)": weight.is_transposed and not conv1d,
        "its inputs are scaled at run time (input_scale), which no tensor there can say": around.input_scale,
        "it is rotated, which no tensor there can say": bool(around.input_rotation or around.output_rotation),
        "its inputs are in the order of quantization, which no tensor there can say": around.order and not order,
        f"its inputs are quantized as {around.act}; possible are {', '.join(map(str, acts))}": around.act not in acts,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def conv1d_notes(inventory: Inventory) -> tuple[str, ...]:
    """Who opens a folder with weights of a Conv1D, where that is not everybody."""
    count = sum(weight.is_transposed for weight in inventory.weights.values())
    return (f"{count} weights of a Conv1D: GPTQModel.load opens them, transformers 5.23 does not",) if count else ()


def nearest_integer(weight: QuantTensor, bits: Sequence[int], zeros: Sequence[Zero] = ("none", "int")) -> WeightSpec:
    """The integer spec of one of these widths and kinds of zero that comes closest to that of a weight."""
    spec = weight.spec
    wanted = spec.bits / spec.vector
    width = min(bits, key=lambda known: (abs(known - wanted), known < wanted))
    zero: Zero = "none" if spec.is_symmetric else "int"
    near = WeightSpec.integer(width, None if spec.rows != 1 else spec.group, zero if zero in zeros else zeros[0])
    return near.fit(weight.stored_shape)


def single(what: str, values: Mapping[str, T]) -> T:
    """The one value that all weights have, for a config that can state only one.

    Raises: ExportError naming two weights that differ.
    """
    (first, value), *others = values.items()
    for name, other in others:
        if other != value:
            raise ExportError(
                f'this format has one {what} for all weights, but "{first}" has {value} and "{name}" {other}; '
                'quantize them alike, store them anew (quant="nearest" or a spec), or use compressed-tensors or gptq'
            )
    return value


def needed(entries: Entries, name: str, *tails: str) -> list[Entry]:
    """The entries of these tails. Raises: CheckpointError if one is missing."""
    missing = [tail for tail in tails if tail not in entries]
    if missing:
        raise damaged(name, f"there is no {missing[0]} beside {', '.join(sorted(entries))}")
    return [entries[tail] for tail in tails]


class DamagedWeight(CheckpointError):
    """A weight whose tensors make no sense. Who opened the folder adds which one it is."""


def damaged(name: str, fault: str) -> DamagedWeight:
    """The error for a weight whose tensors make no sense."""
    return DamagedWeight(f'the tensors of "{name}" make no sense: {fault}; download or save the folder again')


def scale_dtype_name(name: str, dtype: torch.dtype) -> str:
    """What specs call the type of scales in a file. Raises: CheckpointError for one that holds no scales."""
    found = next((short for short, known in SCALE_DTYPES.items() if known == dtype), None)
    if found is None:
        raise damaged(name, f"its scales are {dtype}, known are {', '.join(map(str, SCALE_DTYPES.values()))}")
    return found
