"""`ptqc.load("model.gguf")`: a GGUF file as a transformers model.

Matrices whose codes a spec describes stay codes (`QuantTensor`), bit for bit; the rest becomes floats. A file may be
hostile: shapes are held against a model on the meta device before memory of any size is asked for.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptqc.codegen.export._gguf_config import configuration
from ptqc.codegen.export._gguf_decode import decode_weight
from ptqc.codegen.export._gguf_parse import Contents, parse
from ptqc.codegen.export._gguf_placement import Placement, placements
from ptqc.errors import CheckpointError, ExportError, first_line
from ptqc.folders.skeleton import places_of, put

__all__ = ["is_gguf", "load_gguf"]

_DERIVED = frozenset({"rope_freqs.weight"})
"""Tensors that the configuration already tells."""


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def load_gguf(path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a file, on the CPU and in evaluation mode. dtype: of floats, float32 by default.

    Raises: CheckpointError that says what is wrong with the file.
    """
    contents = parse(path)
    architecture, config = configuration(contents)
    _check(contents, _placed(contents, architecture, _built(contents, config, "meta")))
    model = _built(contents, config, "cpu")
    parameters = {id(place.tensor): place for place in places_of(model) if isinstance(place.tensor, nn.Parameter)}
    together: dict[int, list[Placement]] = {}
    for at in _placed(contents, architecture, model):
        if at.stored_name not in _DERIVED:
            together.setdefault(id(at.weight), []).append(at)
    for number, placed in together.items():
        value = decode_weight(contents, placed, dtype or torch.float32)
        if number not in parameters:
            placed[0].weight.copy_(value)
            continue
        put(parameters[number], value, f"{placed[0].stored_name} of {path}")
    model.config._name_or_path = str(path)
    loaded: nn.Module = model.eval()
    return loaded


def _built(contents: Contents, config: Any, device: str) -> Any:
    """The model without values; memory on the cpu that nothing has touched yet."""
    from transformers import AutoModelForCausalLM  # here: plain modules need no transformers
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights(), torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
    except Exception as error:  # hostile values fail anywhere in transformers, in any way
        raise CheckpointError(f"transformers cannot build the model of {contents.path}: {first_line(error)}") from error
    return model


def _placed(contents: Contents, architecture: Any, model: Any) -> list[Placement]:
    try:
        return placements(architecture, model)
    except ExportError as error:
        raise CheckpointError(f"{contents.path} cannot be read: {error}") from error


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading axes of 1, which other writers keep or drop."""
    return _plain(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def _check(contents: Contents, placed: list[Placement]) -> None:
    """Hold names and shapes of the file against the model."""
    for at in placed:
        stored = contents.tensors.get(at.stored_name)
        if stored is None:
            raise CheckpointError(f"{contents.path} lacks {at.stored_name}")
        if _plain(stored.shape) != _plain(at.shape):
            raise CheckpointError(f"{contents.path} has {at.stored_name} of shape {stored.shape}, not {at.shape}")
    known = {at.stored_name for at in placed} | _DERIVED
    unknown = [name for name in contents.tensors if name not in known]
    if unknown:
        more = f" ({len(unknown)} such tensors)" if len(unknown) > 1 else ""
        raise CheckpointError(f"{contents.path} has {unknown[0]}, for which its architecture has no place{more}")
