"""Calibration data in any form a user has it, as a list of model inputs.

    "docs", "code", a path      documents of an embedded text or a file (`ptqc.texts.read_documents`): packed
    strings                     documents: packed
    a tensor [tokens]           one long text of token ids: packed
    a tensor [rows, tokens]     a batch, taken as it is
    a mapping                   inputs of the model by name, a batch, taken as it is
    any iterable of tensors     (a list, a DataLoader, a generator) a batch each, taken as they are;
    lists of ids or mappings    [tokens] becomes [1, tokens], and (tensor,) the tensor

Packing: documents are tokenized, joined in order with the tokenizer's end-of-sequence token between them (where it
has one), and cut into windows that do not overlap, one a batch. What does not fill the last window is cut off. Cuts
are logged with their size.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqc.errors import PtqcError
from ptqc.texts import read_documents, tokenize

__all__ = ["batches"]

log = logging.getLogger("ptqc")

Batch = dict[str, Tensor]


def batches(
    calibration: Any, tokenizer: Any = None, *, window: int = 512, limit: int | None = 128, column: str = "text"
) -> list[Batch]:
    """Turn calibration data into batches of model inputs by name.

    calibration: one of the forms above. tokenizer: a transformers tokenizer, for text. window: tokens of a packed
    window. limit: batches to take at most (None: all). column: the field of .jsonl and .parquet files.

    Raises: PtqcError for data that is empty, shorter than a window, or of no known form.
    """
    if limit is not None and limit < 1:
        raise PtqcError(f"at least one calibration batch is needed, not {limit}")
    if isinstance(calibration, (str, Path)):
        return _pack_texts(read_documents(calibration, column), tokenizer, window, limit)
    if isinstance(calibration, Tensor) and calibration.ndim == 1:
        return _pack(_token_ids(calibration), window, limit)
    if isinstance(calibration, (Tensor, Mapping)):
        return [_batch(calibration)]
    if not isinstance(calibration, Iterable):
        raise PtqcError(f"calibration data cannot be a {type(calibration).__name__}; {_FORMS}")
    items = _take(calibration, limit)
    if all(isinstance(item, str) for item in items):
        return _pack_texts(items, tokenizer, window, limit)
    return [_batch(item) for item in items]


_FORMS = "use strings with a tokenizer, token tensors, dicts of model inputs, an iterable of those, or a file"


def _take(calibration: Iterable[Any], limit: int | None) -> list[Any]:
    """The items of an iterable: all documents, but no more than `limit` batches."""
    items: list[Any] = []
    for item in calibration:
        if limit is not None and len(items) >= limit and not isinstance(item, str):
            log.warning("calibration: stopped after %d batches; raise the limit to use more", limit)
            break
        items.append(item)
    if not items:
        raise PtqcError("the calibration data is empty")
    return items


def _pack_texts(documents: list[str], tokenizer: Any, window: int, limit: int | None) -> list[Batch]:
    if tokenizer is None:
        raise PtqcError("calibration text needs the model's tokenizer (tokenizer=...)")
    kept = [document for document in documents if document.strip()]
    if len(kept) < len(documents):
        log.info("calibration: %d of %d documents are empty", len(documents) - len(kept), len(documents))
    enough = None if limit is None else limit * window
    end = getattr(tokenizer, "eos_token_id", None)
    pieces: list[Tensor] = []
    tokens = 0
    for number, document in enumerate(kept):
        if enough is not None and tokens >= enough:
            log.info("calibration: %d windows are full, %d documents not read", limit, len(kept) - number)
            break
        if pieces and end is not None:
            pieces.append(torch.tensor([end]))
        pieces.append(tokenize(document, tokenizer, None if enough is None else enough - tokens))
        tokens = sum(len(piece) for piece in pieces)
    return _pack(torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64), window, limit)


def _pack(ids: Tensor, window: int, limit: int | None) -> list[Batch]:
    if len(ids) < window:
        raise PtqcError(
            f"the calibration data has {len(ids)} tokens, one window takes {window}; give more, "
            "or batches of your own (tensors [rows, tokens]), which are taken as they are"
        )
    count = min(len(ids) // window, limit or len(ids))
    if len(ids) > count * window:
        log.info("calibration: %d windows of %d tokens, %d tokens cut off", count, window, len(ids) - count * window)
    return [{"input_ids": row[None]} for row in ids[: count * window].view(count, window)]


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
