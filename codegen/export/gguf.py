"""GGUF, the file format of llama.cpp: one file with metadata, tokenizer and tensors.

Which type a tensor gets, first match wins:

1. a vector: F32,
2. a stored weight that the requested type holds exactly: that type, carried over,
3. the output head (or the embedding where it is tied to it), if the mix says so: in Q4_0 files Q8_0, where llama.cpp
   takes Q6_K, because the logits suffer most from its error,
4. a row that no block divides: F16,
5. the requested type.

Without a request (`quant=None`) every weight gets the smallest type that holds it as it is.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gguf
from gguf import MODEL_TENSOR, GGUFValueType, Keys, LlamaFileType
from torch import Tensor, nn

from ptqc.codegen.export._gguf_architectures import Metadata, Placement, architecture_of, metadata, placements
from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_encode import exact_type, fate_of
from ptqc.codegen.export._gguf_file import Planned, write_file
from ptqc.codegen.export._gguf_tokenizer import read_vocabulary
from ptqc.codegen.exporters import EXPORTERS, Written
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor

__all__ = ["GGUF", "MIXES", "Mix"]


@dataclass(frozen=True)
class Mix:
    """Types of the tensors of a file. base: of matrices. output: of the output head. file_type: the name of the mix."""

    base: str
    output: str
    file_type: LlamaFileType


MIXES: dict[str, Mix] = {
    "F32": Mix("F32", "F32", LlamaFileType.ALL_F32),
    "F16": Mix("F16", "F16", LlamaFileType.MOSTLY_F16),
    "BF16": Mix("BF16", "BF16", LlamaFileType.MOSTLY_BF16),
    "Q8_0": Mix("Q8_0", "Q8_0", LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": Mix("Q4_0", "Q8_0", LlamaFileType.MOSTLY_Q4_0),
}
"""What `quant` may be."""

_WITHOUT_BLOCKS = "F16"
"""Type of a row that no block divides."""


@EXPORTERS.register("gguf")
@dataclass(frozen=True)
class GGUF:
    """Writes GGUF.

    quant: a name in MIXES, or None to keep every weight as it is. pre: llama.cpp's name for how the tokenizer splits
    text, where it cannot be told. name: of the model, in the metadata.
    """

    quant: str | None = None
    pre: str | None = None
    name: str | None = None

    suffix: ClassVar[str] = ".gguf"

    def __post_init__(self) -> None:
        if self.quant is not None and self.quant not in MIXES:
            raise ExportError(f"gguf writes no {self.quant!r} yet; quant may be {', '.join(MIXES)}")

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """Anything but float vectors and matrices."""
        if not weight.is_floating_point():
            return f"it holds {weight.dtype}, not floats; dequantize it first"
        return None if weight.ndim <= 2 else f"it has {weight.ndim} axes, this architecture has none with more than 2"

    def prepare(self, model: nn.Module, tokenizer: Any) -> Callable[[Path], Written]:
        """See `ptqc.codegen.exporters.Exporter`."""
        architecture = architecture_of(model)
        config: Any = model.config
        placed = placements(architecture, model)
        embedding = next((at.weight for at in placed if at.role == MODEL_TENSOR.TOKEN_EMBD), None)
        if embedding is None:
            raise ExportError(f"{type(model).__name__} has no token embedding, so gguf cannot hold it")
        vocabulary = read_vocabulary(_tokenizer_of(config, tokenizer), embedding.shape[0], self.pre, config)
        tensors = [Planned(at, TYPES[self._type_of(at, placed)]) for at in placed]
        keys = [
            Metadata(Keys.General.NAME, GGUFValueType.STRING, self.name or _name_of(config)),
            Metadata(Keys.General.FILE_TYPE, GGUFValueType.UINT32, int(self._file_type(tensors))),
            Metadata(Keys.General.QUANTIZATION_VERSION, GGUFValueType.UINT32, gguf.GGML_QUANT_VERSION),
            *metadata(architecture, config),
        ]
        notes = vocabulary.notes + _notes(tensors)
        return lambda path: Written(write_file(path, architecture.name, keys, vocabulary, tensors), notes)

    def _type_of(self, at: Placement, placed: Sequence[Placement]) -> str:
        """The rules of this file."""
        if at.weight.ndim < 2:
            return "F32"
        if self.quant is None:
            return exact_type(at.weight)
        mix = MIXES[self.quant]
        if TYPES[mix.base].grid is not None and fate_of(at.weight, TYPES[mix.base]) == "lossless":
            return mix.base
        kind = mix.output if _is_output(at, placed) else mix.base
        return kind if at.weight.shape[-1] % TYPES[kind].weights == 0 else _WITHOUT_BLOCKS

    def _file_type(self, tensors: Sequence[Planned]) -> LlamaFileType:
        if self.quant is not None:
            return MIXES[self.quant].file_type
        sizes: Counter[str] = Counter()
        for tensor in tensors:
            sizes[tensor.kind.name] += tensor.at.weight.numel()
        return MIXES[sizes.most_common(1)[0][0]].file_type


def _is_output(at: Placement, placed: Sequence[Placement]) -> bool:
    """Whether a tensor makes the logits: the output head, or the embedding where there is none."""
    if at.role == MODEL_TENSOR.OUTPUT:
        return True
    return at.role == MODEL_TENSOR.TOKEN_EMBD and all(other.role != MODEL_TENSOR.OUTPUT for other in placed)


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
    anew = Counter(
        (str(tensor.at.weight.spec), tensor.kind.name)
        for tensor in tensors
        if isinstance(tensor.at.weight, QuantTensor) and tensor.fate == "requantized"
    )
    for (spec, kind), count in anew.items():
        notes.append(f"{count} weights stored as {spec}, a grid that {kind} lacks: decoded and encoded again")
    odd = [at for at, kind in ((t.at, t.kind) for t in tensors) if at.weight.ndim == 2 and kind.name == _WITHOUT_BLOCKS]
    undivided = [at.name for at in odd if at.weight.shape[1] % 32]
    if undivided:
        notes.append(f"{len(undivided)} weights as {_WITHOUT_BLOCKS}, no block divides their rows: {undivided[0]} ...")
    return tuple(notes)
