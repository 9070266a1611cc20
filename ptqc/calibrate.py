"""Calibration data in any form a user has it, as a list of model inputs.

    "docs", "code", a path      documents of an embedded text or a file (`ptqc.texts.read_documents`): packed
    "name", "name:config"       documents of a data set of the `datasets` library: packed
    strings                     documents: packed
    lists of messages           conversations, documents by the tokenizer's chat template: packed
    mappings with `column`      rows of a data set, documents: packed; "messages" and "conversations" without `column`
    a tensor [tokens]           one long text of token ids: packed
    a tensor [rows, tokens]     a batch, taken as it is
    a mapping                   inputs of the model by name, a batch, taken as it is
    any iterable of tensors     (a list, a DataLoader, a generator) a batch each, taken as they are;
    lists of ids or mappings    [tokens] becomes [1, tokens], and (tensor,) the tensor

Packing is described in `ptqc.windows`. Where there is more than the limit, windows and the batches of a list are drawn
at seeded random; of what can only be iterated over, the first are taken. What is left out is logged with its size.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqc.conversations import COLUMNS, is_conversation, render
from ptqc.errors import PtqcError
from ptqc.texts import EMBEDDED, Document, read_any_dataset, read_any_documents
from ptqc.windows import draw, pack, pack_texts

__all__ = ["batches", "fingerprint", "moved", "shard", "signature"]

log = logging.getLogger("ptqc")

Batch = dict[str, Tensor]


def batches(
    calibration: Any,
    tokenizer: Any = None,
    *,
    window: int = 512,
    limit: int | None = 128,
    seed: int = 0,
    column: str = "text",
    split: str = "train",
) -> list[Batch]:
    """Turn calibration data into batches of model inputs by name.

    calibration: one of the forms above. tokenizer: a transformers tokenizer, for text. window: tokens of a packed
    window. limit: batches to take at most (None: all). seed: which ones. column: the field of .jsonl and .parquet
    files and data sets; split: of data sets.

    Raises: PtqcError for data that is empty, shorter than a window, or of no known form.
    """
    if limit is not None and limit < 1:
        raise PtqcError(f"at least one calibration batch is needed, not {limit}")

    def packed(documents: Sequence[Document]) -> list[Batch]:
        return _rows(pack_texts(render(documents, tokenizer), tokenizer, window, limit, seed))

    if isinstance(calibration, (str, Path)):
        return packed(_read(calibration, column, split))
    if isinstance(calibration, Tensor) and calibration.ndim == 1:
        return _rows(pack(_token_ids(calibration), window, limit, seed))
    if isinstance(calibration, (Tensor, Mapping)):
        return [_batch(calibration)]
    if not isinstance(calibration, Iterable):
        raise PtqcError(f"calibration data cannot be a {type(calibration).__name__}; {_FORMS}")
    if is_conversation(calibration):
        return packed([list(calibration)])
    items = _take(calibration, limit, column)
    documents = [document for document in (_document(item, column) for item in items) if document is not None]
    if len(documents) == len(items):
        return packed(documents)
    return [_batch(item) for item in draw(items, limit, seed, "batches")]


_FORMS = (
    "use strings or conversations with a tokenizer, token tensors, dicts of model inputs, an iterable of those, "
    "a file, or the name of a data set"
)
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_FILES = frozenset({".txt", ".md", ".json", ".jsonl", ".parquet", ".csv", ".gz", ".zst", ".arrow", ".py"})


def shard(batches: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """This process's share of the batches with their numbers: every world-th one under torchrun, else all."""
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return list(enumerate(batches))[rank::world]


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def signature(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    """Names, shapes and dtypes of a batch, alike for batches that one graph serves."""
    return tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(batch.items()))


def fingerprint(batches: Iterable[Mapping[str, Any]]) -> str:
    """A hash of batches: names, types, shapes and values, in order. Equal data has equal fingerprints anywhere."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = torch.as_tensor(batch[name]).detach().cpu().contiguous()
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def _read(source: str | Path, column: str, split: str) -> list[Document]:
    """Documents of an embedded text or a file, or of a data set where the source looks like the name of one."""
    return read_any_dataset(str(source), split, column) if _is_data_set(source) else read_any_documents(source, column)


def _is_data_set(source: str | Path) -> bool:
    text = str(source)
    if isinstance(source, Path) or text in EMBEDDED or len(text) > 200 or not _DATASET.fullmatch(text):
        return False
    return Path(text).suffix not in _FILES and not Path(text).exists()


def _take(calibration: Iterable[Any], limit: int | None, column: str) -> list[Any]:
    """The items of an iterable: all documents and all of a list, but of other iterables no more batches than needed."""
    items: list[Any] = []
    is_list = isinstance(calibration, (list, tuple))
    for item in calibration:
        if limit is not None and len(items) >= limit and not is_list and _document(item, column) is None:
            log.warning("calibration: stopped after %d batches; raise the limit to use more", limit)
            break
        items.append(item)
    if not items:
        raise PtqcError("the calibration data is empty")
    return items


def _document(item: Any, column: str) -> Document | None:
    """The item as a document, None if it is none."""
    if isinstance(item, str):
        return item
    if is_conversation(item):
        return list(item)
    if not isinstance(item, Mapping):
        return None
    found = next((item[name] for name in (column, *COLUMNS) if name in item), None)
    return None if isinstance(found, Mapping) or found is item else _document(found, column)


def _rows(windows: Iterable[Tensor]) -> list[Batch]:
    return [{"input_ids": window[None]} for window in windows]


def _token_ids(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PtqcError(
            f"a calibration tensor of {ids.dtype} holds no token ids; name the input it is for, "
            'as in {"pixel_values": tensor}'
        )
    if ids.numel() == 0:
        raise PtqcError(f"a calibration tensor of shape {tuple(ids.shape)} is empty")
    return ids.long()


def _batch(item: Any) -> Batch:
    """One batch, taken as it is."""
    if isinstance(item, Mapping):
        return _named(item)
    if isinstance(item, (list, tuple)) and len(item) == 1:
        return _batch(item[0])
    if isinstance(item, (list, tuple)) and item and all(isinstance(token, int) for token in item):
        item = torch.tensor(item)
    if not isinstance(item, Tensor):
        raise PtqcError(f"a calibration batch cannot be a {type(item).__name__}; {_FORMS}")
    ids = _token_ids(item)
    if ids.ndim not in (1, 2):
        raise PtqcError(f"token ids must have shape [tokens] or [rows, tokens], not {tuple(ids.shape)}")
    return {"input_ids": ids if ids.ndim == 2 else ids[None]}


def _named(item: Mapping[str, Any]) -> Batch:
    inputs = {str(name): _tensor(name, value) for name, value in item.items() if value is not None}
    if not inputs or any(value.numel() == 0 for value in inputs.values()):
        raise PtqcError(f"a calibration batch is empty (inputs: {', '.join(map(str, item)) or 'none'})")
    return inputs


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise PtqcError(f"the calibration input {name!r} is a {type(value).__name__}, not a tensor") from None
