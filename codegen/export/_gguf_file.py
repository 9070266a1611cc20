"""Writing a GGUF file: header, metadata, vocabulary, tensor table, then one tensor after the other."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType, Keys
from numpy.typing import NDArray

from ptqc.codegen.export._gguf_blocks import BlockType
from ptqc.codegen.export._gguf_encode import encode_bands, fate_of
from ptqc.codegen.export._gguf_family import Metadata
from ptqc.codegen.export._gguf_parse import parse
from ptqc.codegen.export._gguf_placement import Placement
from ptqc.codegen.export._gguf_tokenizer import Vocabulary
from ptqc.codegen.exporters import ExportedTensor, Fate, OnProgress, require_space
from ptqc.errors import ExportError

__all__ = ["Planned", "write_file"]

log = logging.getLogger("ptqc")


@dataclass(frozen=True)
class Planned:
    """A tensor of the file and its type. importance: [in], of its columns. wanted: the type it would have if blocks
    divided its rows."""

    at: Placement
    kind: BlockType
    importance: NDArray[np.float32] | None = None
    wanted: str | None = None

    @property
    def fate(self) -> Fate:
        """What becomes of the weight."""
        return fate_of(self.at.weight, self.kind)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.at.shape) // self.kind.weights * self.kind.nbytes


def write_file(
    path: Path,
    architecture: str,
    keys: Sequence[Metadata],
    vocabulary: Vocabulary,
    tensors: Sequence[Planned],
    on_progress: OnProgress = lambda done, total, name: None,
) -> tuple[ExportedTensor, ...]:
    """Write everything, holding one band of a tensor at a time, and read the tensor table back.

    Raises: ExportError for values a type cannot hold, a disk that cannot hold the file, or a file that does not read
    back; OSError.
    """
    total = sum(tensor.nbytes for tensor in tensors)
    require_space(path, total)
    done = 0

    def count(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(done, total, name)

    writer = gguf.GGUFWriter(path, architecture)
    try:
        for row in keys:
            writer.add_key_value(row.key, row.value, row.kind)
        _add_vocabulary(writer, vocabulary)
        for tensor in tensors:
            at, kind = tensor.at, GGMLQuantizationType[tensor.kind.name]
            writer.add_tensor_info(at.stored_name, at.shape, np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        written = tuple(_write_tensor(writer, file, tensor, count) for tensor in tensors)
    finally:
        writer.close()
    _read_back(path, written)
    return written


def _write_tensor(
    writer: gguf.GGUFWriter, file: BinaryIO, tensor: Planned, count: Callable[[str, int], None]
) -> ExportedTensor:
    """Not by the writer, which takes tensors whole."""
    at, kind = tensor.at, tensor.kind.name
    for piece in encode_bands(at, tensor.kind, tensor.importance):
        file.write(piece.data)
        count(at.name, piece.nbytes)
    writer.write_padding(file, tensor.nbytes)
    log.debug("%s -> %s: %s, %s, %d bytes", at.name, at.stored_name, kind, tensor.fate, tensor.nbytes)
    return ExportedTensor(at.name, at.stored_name, kind, tensor.fate, tensor.nbytes)


_SPECIAL_KEYS: dict[str, str] = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    for role, index in vocabulary.special.items():
        writer.add_uint32(_SPECIAL_KEYS[role], index)
    for name, value in vocabulary.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    template = vocabulary.chat_template
    if template:
        named = template if isinstance(template, str) else [{"name": k, "template": v} for k, v in template.items()]
        writer.add_chat_template(named)


def _read_back(path: Path, written: Sequence[ExportedTensor]) -> None:
    """With our own reader: that of the package takes seconds and 240 MB for a vocabulary of 128256 tokens."""
    found = [(name, tensor.kind.name, tensor.nbytes) for name, tensor in parse(path).tensors.items()]
    wanted = [(tensor.stored_name, tensor.stored_as, tensor.nbytes) for tensor in written]
    if found != wanted:
        lost = next(name for name in wanted if name not in found)
        raise ExportError(f"the file does not read back as it was written: {lost[0]} is missing or another")
