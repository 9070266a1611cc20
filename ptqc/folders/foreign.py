"""Opening model folders that other programs quantized, in the dialects of `ptqc.codegen.dialects`.

Which tensors make up a weight follows from their names; what they say is held against the headers before a large one
is read. The model is built by transformers without values and filled with one weight at a time.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptqc.codegen.dialect import DIALECTS, DamagedWeight, Dialect, damaged
from ptqc.errors import CheckpointError, SpecError, UnknownNameError
from ptqc.folders.architecture import build_empty, build_unfilled, planned_dtype
from ptqc.folders.folder import ModelFolder
from ptqc.folders.manifest import FLOAT_DTYPES, METHOD
from ptqc.folders.naming import stacked, stored_names
from ptqc.folders.safefile import TensorEntry
from ptqc.folders.skeleton import places_of, put
from ptqc.folders.sources import direct_sources, targets_of
from ptqc.qtensor import QuantTensor
from ptqc.surroundings import check_extras

__all__ = ["Foreign", "fill_foreign", "load_foreign", "open_foreign", "stored_pieces", "turned"]

log = logging.getLogger("ptqc")


@dataclass(frozen=True)
class Foreign:
    """The weights of a folder in a dialect.

    weights: the quantized ones by parameter name, on the meta device. entries: their tensors, by name and tail.
    floats: every other tensor. dtype: of the model.
    """

    path: Path
    dialect: Dialect
    weights: Mapping[str, QuantTensor]
    entries: Mapping[str, Mapping[str, TensorEntry]]
    floats: Mapping[str, TensorEntry]
    dtype: torch.dtype

    def read(self, name: str) -> QuantTensor:
        """A quantized weight.

        Raises: CheckpointError if its tensors are not what was described, or hold impossible values.
        """
        with _named(self.path):
            weight = self.dialect.read(self.weights[name], self.entries[name])
            _check(name, weight, self.weights[name])
            return weight


def _check(name: str, weight: QuantTensor, meta: QuantTensor) -> None:
    """Hold a weight against its description."""
    for part, wanted in meta.tensors.items():
        found = weight.tensors[part]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise damaged(name, f"{part} is {found.dtype} {list(found.shape)}, not {wanted.dtype}")
    try:
        check_extras(weight.surroundings, weight.extras, weight.stored_shape)
    except SpecError as error:
        raise damaged(name, str(error)) from None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in which folder a weight is damaged."""
    try:
        yield
    except DamagedWeight as error:
        raise CheckpointError(f"{path}: {error}") from None


def open_foreign(stored: ModelFolder) -> Foreign | None:
    """What a folder that another program quantized holds; None for float folders and our own.

    Raises: CheckpointError for a dialect that is not known, or tensors that contradict it.
    """
    config = stored.config.get("quantization_config")
    if not isinstance(config, Mapping) or config.get("quant_method") == METHOD:
        return None
    where = str(stored.path / "config.json")
    kind = _dialect_named(config.get("quant_method"), where)
    dialect = kind.of_config(config, where)
    entries = _by_weight(stored, dialect)
    if not entries:
        raise CheckpointError(f"{where} speaks of {config['quant_method']}, but no tensor is called {dialect.markers}")
    dtype = _dtype_of(stored)
    with _named(stored.path):
        weights = {name: dialect.describe(name, tails, dtype) for name, tails in entries.items()}
    taken = {f"{name.removesuffix('weight')}{tail}" for name, tails in entries.items() for tail in tails}
    floats = {name: entry for name, entry in stored.entries.items() if name not in taken}
    return Foreign(stored.path, dialect, weights, entries, floats, dtype)


def _dialect_named(method: object, where: str) -> type[Dialect]:
    try:
        return DIALECTS.get(str(method).replace("-", "_"))
    except UnknownNameError:
        known = ", ".join([METHOD, *(name.replace("_", "-") for name in DIALECTS.names())])
        raise CheckpointError(
            f"{where} is quantized by {method!r}, not one of {known}; open it with what wrote it"
        ) from None


def _by_weight(stored: ModelFolder, dialect: Dialect) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of each quantized weight by its name and their tails."""
    ends = "|".join(re.escape(tail) for tail in sorted(dialect.tails, key=len, reverse=True))
    pattern = re.compile(rf"((?:.*\.)?)({ends})", re.DOTALL)
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in stored.entries.items():
        match = pattern.fullmatch(name)
        if match is not None:
            found.setdefault(f"{match[1]}weight", {})[match[2]] = entry
    return {name: tails for name, tails in found.items() if any(marker in tails for marker in dialect.markers)}


def _dtype_of(stored: ModelFolder) -> torch.dtype:
    name = stored.config.get("dtype") or stored.config.get("torch_dtype")
    return FLOAT_DTYPES.get(name, torch.float16) if isinstance(name, str) else torch.float16


# -------------------------------------------------------------------- models


def load_foreign(
    stored: ModelFolder, foreign: Foreign, dtype: torch.dtype | None, trust_remote_code: bool
) -> nn.Module:
    """The transformers model of a folder, its quantized weights QuantTensors.

    dtype: what floating-point tensors become and quantized weights pretend to be, instead of what the config says.

    Weights that transformers packs while it loads (experts) are packed here as they are where they have one spec, and
    as floating-point numbers otherwise.

    Raises: CheckpointError if a weight is missing or has another shape than the model's.
    """
    # The empty one first: sizes that no tensor has fail before memory is asked for.
    empty = build_empty(_as_weights(stored, foreign), trust_remote_code)
    foreign = turned(foreign, empty, targets_of(empty, foreign.weights))
    seen = _as_weights(stored, foreign)
    model: nn.Module = build_unfilled(seen, trust_remote_code)
    sources = direct_sources(model, seen)
    if isinstance(sources, str):
        log.info("%s: %s; put together from pieces", stored.path, sources)
        wanted = stored_pieces(model, seen)
    else:
        names = {id(entry): name for name, entry in seen.entries.items()}
        wanted = {target: [names[id(entry)]] for target, entry in sources.entries.items()}
    base = dtype or foreign.dtype
    _fill(model, foreign, wanted, lambda name: planned_dtype(model, name, base))
    _finish(model, stored, base)
    return model.eval()


def turned(foreign: Foreign, model: nn.Module, targets: Mapping[str, str]) -> Foreign:
    """The same with the weights turned that a model has in a Conv1D, [in, out]: files hold all of them [out, in].

    targets: for each stored name the parameter of the model.
    """
    modules = dict(model.named_modules())
    owners = {name: modules.get(targets.get(name, name).rpartition(".")[0]) for name in foreign.weights}
    weights = {
        name: weight.with_parts(weight.parts, is_transposed=isinstance(owners[name], Conv1D))
        for name, weight in foreign.weights.items()
    }
    return replace(foreign, weights=weights)


def fill_foreign(model: nn.Module, stored: ModelFolder, foreign: Foreign, dtype: torch.dtype | None) -> nn.Module:
    """Fill a module whose parameters have the names of the folder's weights. In place; the rest is as above."""
    foreign, names = turned(foreign, model, {}), {*foreign.weights, *foreign.floats}
    wanted = {name: [name] for place in places_of(model) for name in place.names if name in names}
    missing = [place.names[0] for place in places_of(model) if not wanted.keys() & set(place.names)]
    left = sorted(names.difference(wanted))
    if missing or left:
        raise CheckpointError(
            f"{stored.path} does not fit the skeleton: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(left)} too many {left[:3]}; give a module like the one that was saved"
        )
    _fill(model, foreign, wanted, lambda name: dtype)
    return model


def stored_pieces(model: nn.Module, seen: ModelFolder) -> dict[str, list[str]]:
    """The stored names of the pieces of every parameter, in the order of its rows.

    Raises: CheckpointError if one is missing, or has another shape.
    """
    state = {place.names[0]: place.tensor for place in places_of(model)}
    wanted: dict[str, list[tuple[tuple[int, int], str]]] = {}
    for name, piece in stored_names(model, state).items():
        shape = tuple(piece.of(torch.empty(state[piece.name].shape, device="meta")).shape)
        entry = seen.entries.get(name)
        if entry is None or entry.shape != shape:
            found = "lacks it" if entry is None else f"has {list(entry.shape)}"
            raise CheckpointError(f"the model needs {name} of shape {list(shape)}, {seen.path} {found}")
        wanted.setdefault(piece.name, []).append(((piece.index or 0, (piece.rows or (0, 0))[0]), name))
    return {parameter: [name for _, name in sorted(pieces)] for parameter, pieces in wanted.items()}


def _as_weights(stored: ModelFolder, foreign: Foreign) -> ModelFolder:
    """The folder as it would look with plain weights: headers only."""
    entries = dict(foreign.floats)
    for name, weight in foreign.weights.items():
        path = next(iter(foreign.entries[name].values())).path
        entries[name] = TensorEntry(path, foreign.dtype, tuple(weight.shape), 0, 0)
    return replace(stored, entries=entries)


def _fill(
    model: nn.Module, foreign: Foreign, wanted: Mapping[str, list[str]], dtype_of: Callable[[str], torch.dtype | None]
) -> None:
    """wanted: for names of the model the stored names of the pieces, one for most."""
    for place in places_of(model):
        name = next((name for name in place.names if name in wanted), None)
        if name is None:
            continue
        dtype, stored = dtype_of(name), wanted[name]
        read = [foreign.read(one) if one in foreign.weights else foreign.floats[one].read() for one in stored]
        value = read[0] if len(read) == 1 else _packed(name, read, place.tensor.shape)
        if isinstance(value, QuantTensor):
            value = value.with_parts(value.parts, dtype=dtype or value.dtype)
        elif dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        put(place, value, f"{stored[0]} of {foreign.path}")


def _packed(name: str, pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """Matrices one below the other, as a parameter of this shape."""
    packed = stacked([piece for piece in pieces if isinstance(piece, QuantTensor)], shape)
    if packed is not None and all(isinstance(piece, QuantTensor) for piece in pieces):
        return packed
    log.warning("%s: its pieces are not quantized alike, it becomes floating point", name)
    plain = [piece.dequantize() if isinstance(piece, QuantTensor) else piece for piece in pieces]
    return torch.cat(plain).view(shape)


def _finish(model: Any, stored: ModelFolder, dtype: torch.dtype) -> None:
    """What `from_pretrained` does to a model besides loading weights."""
    from transformers import GenerationConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    model.config.dtype = dtype
    model.config._name_or_path = str(stored.path)
    if (stored.path / "generation_config.json").exists() and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(stored.path))
        except Exception as error:  # the fields of a hostile file fail anywhere in transformers, in any way
            log.warning("%s: generation_config.json is left out: %s", stored.path, error)
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING[METHOD](AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](), pre_quantized=True)
