"""The manifest of a checkpoint: which of its weights are quantized, and how. It is config.json's `quantization_config`.

    {"quant_method": "ptqc", "version": 1, "dtype": "float16", "tied": {"lm_head.weight": "model.embed.weight"},
     "weights": {"model.layers.0.mlp.up_proj.weight": {"spec": "int4g64", "shape": [1280, 512]}, ...}}

A weight is stored as its parts, under "<name>.<part>". `shape` is [..., out, in] as stored; "transposed": true means
that the parameter itself looks like [..., in, out]; "dtype" is given where it is not that of the manifest. "around"
is given where something is done around the stored matrix (`ptqc.surroundings`), whose extras are stored like parts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ptqc import storage
from ptqc.errors import CheckpointError, SpecError
from ptqc.folders.safefile import Layout
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings, check_extras

__all__ = ["FLOAT_DTYPES", "METHOD", "Manifest", "StoredWeight", "manifest_of"]

METHOD = "ptqc"
VERSION = 1
FLOAT_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
"""What a weight may pretend to be."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """How one weight is stored. shape: [..., out, in]. dtype: what it pretends to be. surroundings: what is done
    around it."""

    spec: WeightSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_transposed: bool = False
    surroundings: Surroundings = field(default_factory=Surroundings)

    @staticmethod
    def of(weight: QuantTensor) -> "StoredWeight":
        """The description of a weight in memory."""
        return StoredWeight(weight.spec, weight.stored_shape, weight.dtype, weight.is_transposed, weight.surroundings)

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter that holds it."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.is_transposed else self.shape

    def layout(self, name: str) -> Layout:
        """Shape and dtype of its parts and extras, by their names in a checkpoint."""
        tensors = storage.part_layout(self.spec, self.shape) | self.surroundings.layout(self.shape)
        return {f"{name}.{part}": stored for part, stored in tensors.items()}

    def build(self, parts: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> QuantTensor:
        """The weight from its parts and extras. dtype: what it shall pretend to be instead.

        Raises: CheckpointError for extras with impossible values.
        """
        extras = {name: parts[name] for name in self.surroundings.extra_names}
        try:
            check_extras(self.surroundings, extras, self.shape)
        except SpecError as error:
            raise CheckpointError(f"a weight in {self.spec} of shape {list(self.shape)}: {error}") from None
        return QuantTensor(
            parts, self.spec, self.shape, dtype or self.dtype, self.is_transposed, self.surroundings, extras
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The quantized weights of a checkpoint by name, and names of tied parameters with the name that is stored.

    recipe: how they were quantized, as rows of `ptqc.recipe`; for the reader, nothing depends on it.
    """

    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    recipe: Sequence[Mapping[str, Any]] = ()

    def layout(self) -> Layout:
        """Shape and dtype of every part of every weight."""
        return {part: stored for name, weight in self.weights.items() for part, stored in weight.layout(name).items()}

    def to_config(self) -> dict[str, Any]:
        """The JSON form."""
        usual = _usual_dtype(self)
        config: dict[str, Any] = {"quant_method": METHOD, "version": VERSION, "dtype": usual}
        if self.tied:
            config["tied"] = dict(self.tied)
        if self.recipe:
            config["recipe"] = [dict(row) for row in self.recipe]
        config["weights"] = {name: _row(weight, usual) for name, weight in self.weights.items()}
        return config

    @staticmethod
    def from_config(config: object, where: str) -> "Manifest":
        """Read the JSON form. where: the file it came from, for messages.

        Raises: CheckpointError for anything but the manifest of a version we know.
        """
        if not isinstance(config, Mapping) or config.get("quant_method") != METHOD:
            method = config.get("quant_method") if isinstance(config, Mapping) else config
            raise CheckpointError(f"{where} is quantized by {method!r}, not ptqc; open it with what wrote it")
        if config.get("version") != VERSION:
            found = config.get("version")
            raise CheckpointError(f"{where} has version {found!r} of the ptqc format, we know {VERSION}; update ptqc")
        rows, tied, usual = config.get("weights"), config.get("tied", {}), config.get("dtype")
        if not isinstance(rows, Mapping) or not isinstance(tied, Mapping):
            raise CheckpointError(f"{where}: weights and tied of quantization_config must be tables; save it again")
        if not all(isinstance(name, str) for pair in tied.items() for name in pair):
            raise CheckpointError(f"{where}: tied of quantization_config must map names to names; save it again")
        recipe = config.get("recipe", [])
        if not isinstance(recipe, list) or not all(isinstance(row, Mapping) for row in recipe):
            raise CheckpointError(f"{where}: recipe of quantization_config must be a list of tables; save it again")
        weights = {name: _stored_weight(name, row, usual, where) for name, row in rows.items()}
        return Manifest(weights, dict(tied), tuple(recipe))

    def check(self, stored: Layout, where: str) -> None:
        """Hold what a checkpoint stores against what the manifest says.

        Raises: CheckpointError for a part that is missing, or has another shape or dtype than its spec says.
        """
        for name, weight in self.weights.items():
            for part, expected in weight.layout(name).items():
                if part not in stored:
                    raise CheckpointError(f"{where} lacks {part}, a part of a weight in {weight.spec}; save it again")
                if stored[part] != expected:
                    raise CheckpointError(
                        f"{where}: {part} is {_said(stored[part])}, but {weight.spec} of shape {list(weight.shape)} "
                        f"stores {_said(expected)}; quantization_config and the tensors disagree, save it again"
                    )


def manifest_of(
    state: Mapping[str, Tensor], tied: Mapping[str, str] | None = None, recipe: Sequence[Mapping[str, Any]] = ()
) -> Manifest:
    """The manifest of the quantized weights among `state`. recipe: how they were quantized, if that is known.

    Raises: CheckpointError for a weight whose spec has no name.
    """
    weights = {name: StoredWeight.of(weight) for name, weight in state.items() if isinstance(weight, QuantTensor)}
    for name, weight in weights.items():
        if WeightSpec.parse(str(weight.spec)) != weight.spec:
            raise CheckpointError(f'"{name}": {weight.spec!r} has no name that parses back; use a spec of the grammar')
    return Manifest(weights, tied or {}, tuple(recipe) if weights else ())


def _usual_dtype(manifest: Manifest) -> str:
    counts = Counter(str(weight.dtype).removeprefix("torch.") for weight in manifest.weights.values())
    return counts.most_common(1)[0][0] if counts else "float32"


def _row(weight: StoredWeight, usual: str) -> dict[str, Any]:
    row: dict[str, Any] = {"spec": str(weight.spec), "shape": list(weight.shape)}
    if weight.is_transposed:
        row["transposed"] = True
    if not weight.surroundings.is_trivial:
        row["around"] = weight.surroundings.to_json()
    dtype = str(weight.dtype).removeprefix("torch.")
    return row if dtype == usual else row | {"dtype": dtype}


def _stored_weight(name: str, row: object, usual: object, where: str) -> StoredWeight:
    if not isinstance(row, Mapping) or not isinstance(row.get("spec"), str):
        raise CheckpointError(f"{where}: quantization_config names no spec for {name}; save it again")
    shape, dtype, is_transposed = row.get("shape"), row.get("dtype", usual), row.get("transposed", False)
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(n) is int and 0 < n < 2**40 for n in shape):
        raise CheckpointError(f"{where}: quantization_config gives {name} the shape {shape!r}; save it again")
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES or not isinstance(is_transposed, bool):
        known = ", ".join(FLOAT_DTYPES)
        raise CheckpointError(f"{where}: quantization_config gives {name} the dtype {dtype!r}; known are {known}")
    try:
        spec, around = WeightSpec.parse(row["spec"]), Surroundings.from_json(row.get("around", {}))
        weight = StoredWeight(spec, tuple(shape), FLOAT_DTYPES[dtype], is_transposed, around)
        weight.layout(name)
    except SpecError as error:
        raise CheckpointError(f"{where}: {name}: {error}") from None
    return weight


def _said(stored: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{str(stored[1]).removeprefix('torch.')} {list(stored[0])}"
