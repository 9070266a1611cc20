"""GGUF, the file format of llama.cpp: one file with metadata, tokenizer and tensors.

Which type a tensor gets, first match wins:

1. a vector: F32,
2. a stored weight that the type of the mix holds with its codes: that type, carried over,
3. what the mix says of its role and layer (`_gguf_mixes`), or a type with smaller blocks where none divides its rows.

Without a request (`quant=None`) every weight gets the smallest type that holds it as it is.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
from gguf import MODEL_TENSOR, GGUFValueType, Keys, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor, nn

from ptqc.codegen.export._gguf_architectures import architecture_of, metadata
from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_carry import carried
from ptqc.codegen.export._gguf_encode import exact_type
from ptqc.codegen.export._gguf_family import Metadata
from ptqc.codegen.export._gguf_file import Planned, write_file
from ptqc.codegen.export._gguf_imatrix import importance_by_tensor
from ptqc.codegen.export._gguf_mixes import ALIASES, MIXES, Facts, Place, fitting_type, type_in_mix
from ptqc.codegen.export._gguf_placement import Placement, placements
from ptqc.codegen.export._gguf_tokenizer import read_vocabulary
from ptqc.codegen.exporters import EXPORTERS, OnProgress, ReadRows, Written
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor

__all__ = ["GGUF"]


@EXPORTERS.register("gguf")
@dataclass(frozen=True)
class GGUF:
    """Writes GGUF.

    quant: a name in MIXES, or None to keep every weight as it is. pure: one type for all matrices, whatever the mix
    says. importance: what an error in each input channel of a weight counts, [in] by its name (the mean square of its
    inputs, as `ptqc.importance` gives it), or an imatrix file of llama.cpp; weights without one count all alike.
    pre: llama.cpp's name for how the tokenizer splits text, where it cannot be told. name: of the model, in the
    metadata.
    """

    quant: str | None = None
    pure: bool = False
    importance: Mapping[str, Tensor] | str | PathLike[str] | None = None
    pre: str | None = None
    name: str | None = None

    suffix: ClassVar[str] = ".gguf"

    def __post_init__(self) -> None:
        if self.quant is not None and ALIASES.get(self.quant, self.quant) not in MIXES:
            raise ExportError(f"gguf writes no {self.quant!r}; quant may be {', '.join(MIXES)}")

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """Anything but float vectors, matrices and stacks of matrices."""
        if not weight.is_floating_point():
            return f"it holds {weight.dtype}, not floats; dequantize it first"
        return None if weight.ndim <= 3 else f"it has {weight.ndim} axes, no tensor of a language model has more than 3"

    def prepare(self, model: nn.Module, tokenizer: Any) -> Callable[[Path], Written]:
        """See `ptqc.codegen.exporters.Exporter`."""
        return self.prepare_streamed(model, tokenizer)

    def prepare_streamed(
        self,
        model: nn.Module,
        tokenizer: Any,
        read: ReadRows | None = None,
        on_progress: OnProgress = lambda done, total, name: None,
    ) -> Callable[[Path], Written]:
        """See `ptqc.codegen.exporters.StreamingExporter`."""
        architecture = architecture_of(model)
        config: Any = model.config
        placed = placements(architecture, model, read)
        embedding = next((at for at in placed if at.role == MODEL_TENSOR.TOKEN_EMBD), None)
        if embedding is None:
            raise ExportError(f"{type(model).__name__} has no token embedding, so gguf cannot hold it")
        vocabulary = read_vocabulary(_tokenizer_of(config, tokenizer), embedding.shape[0], self.pre, config)
        counts, unmatched = importance_by_tensor(self.importance, placed)
        facts = _facts(config, placed, bool(counts))
        tensors = [self._planned(at, facts, counts.get(at.stored_name)) for at in placed]
        keys = [
            Metadata(Keys.General.NAME, GGUFValueType.STRING, self.name or _name_of(config)),
            Metadata(Keys.General.FILE_TYPE, GGUFValueType.UINT32, int(self._file_type(tensors))),
            Metadata(Keys.General.QUANTIZATION_VERSION, GGUFValueType.UINT32, gguf.GGML_QUANT_VERSION),
            *metadata(architecture, config),
        ]
        notes = vocabulary.notes + _notes(tensors) + unmatched
        return lambda path: Written(write_file(path, architecture.name, keys, vocabulary, tensors, on_progress), notes)

    def _planned(self, at: Placement, facts: Facts, importance: NDArray[np.float32] | None) -> Planned:
        """By the rules of this file."""
        columns = at.shape[-1]
        if len(at.shape) < 2:
            return Planned(at, TYPES["F32"])
        if self.quant is None:
            return Planned(at, TYPES[exact_type(at.weight, columns)], importance)
        mix = MIXES[ALIASES.get(self.quant, self.quant)]
        base = TYPES[fitting_type(mix.base, columns)]
        if carried(at.weight, base) is not None:
            return Planned(at, base)
        wanted = type_in_mix(mix, Place(at.role, at.layer), facts, self.pure)
        return Planned(at, TYPES[fitting_type(wanted, columns)], importance, wanted)

    def _file_type(self, tensors: Sequence[Planned]) -> LlamaFileType:
        if self.quant is not None:
            return MIXES[ALIASES.get(self.quant, self.quant)].file_type
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[tensor.kind.name] += math.prod(tensor.at.shape)
        commonest = sizes.most_common(1)[0][0]
        return next(mix.file_type for mix in MIXES.values() if mix.base == commonest)


def _facts(config: Any, placed: Sequence[Placement], has_importance: bool) -> Facts:
    heads = getattr(config, "num_attention_heads", None) or 1
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    return Facts(
        layers=config.num_hidden_layers,
        queries_per_key=heads // (getattr(config, "num_key_value_heads", None) or heads),
        experts=experts,
        is_tied=all(at.role != MODEL_TENSOR.OUTPUT for at in placed),
        has_importance=has_importance,
    )


def _tokenizer_of(config: Any, tokenizer: Any) -> Any:
    source = tokenizer if tokenizer is not None else getattr(config, "_name_or_path", None)
    if not source:
        raise ExportError("a gguf file holds its tokenizer: pass tokenizer=, a folder or an object")
    return source


def _name_of(config: Any) -> str:
    return Path(getattr(config, "_name_or_path", "") or config.model_type).name


def _notes(tensors: Sequence[Planned]) -> tuple[str, ...]:
    """What happened to weights that the reader of the report may not expect."""
    notes = []
    anew: Counter[tuple[str, str, bool]] = Counter()
    for tensor in tensors:
        weight = tensor.at.weight
        if isinstance(weight, QuantTensor) and tensor.fate == "requantized":
            anew[str(weight.spec), tensor.kind.name, carried(weight, tensor.kind) is not None] += 1
    for (spec, kind, is_kept), count in anew.items():
        kept, lost = "codes kept, minima rounded to float16", "a grid it lacks: decoded and encoded again"
        notes.append(f"{count} weights stored as {spec} into {kind}, {kept if is_kept else lost}")
    undivided: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        if tensor.wanted not in (None, tensor.kind.name):
            undivided.setdefault((tensor.kind.name, tensor.wanted or ""), []).append(tensor.at.name)
    for (kind, wanted), names in undivided.items():
        notes.append(f"{len(names)} weights as {kind}, no block of {wanted} divides their rows: {names[0]} ...")
    return tuple(notes)
