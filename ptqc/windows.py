"""Windows: token ids of equal length cut from documents.

Documents are tokenized, joined in order with the tokenizer's end-of-sequence token between them (where it has one),
and cut into windows that do not overlap, one a batch. What does not fill the last window is cut off.

Where there is more than asked for, windows are drawn at seeded random: stretches of documents (whole ones, or a few
hundred thousand characters of a longer one) are tokenized in random order until they hold four times the tokens that
are needed, and the windows are drawn from those, without repetition, in the order of the text. Cuts are logged.
"""

import logging
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptqc.errors import PtqcError
from ptqc.texts import pieces, tokenize

__all__ = ["draw", "pack", "pack_texts"]

log = logging.getLogger("ptqc")

_POOL = 4
"""Tokens looked at for each token needed: enough that windows come from all over a text, and bounded."""


def pack_texts(documents: Sequence[str], tokenizer: Any, window: int, limit: int | None, seed: int) -> list[Tensor]:
    """Windows of documents, [window] int64 each. limit: windows to take at most; seed: of which.

    Raises: PtqcError without a tokenizer, and for data that does not fill one window.
    """
    if tokenizer is None:
        raise PtqcError("calibration text needs the model's tokenizer (tokenizer=...)")
    kept = [document for document in documents if document.strip()]
    if len(kept) < len(documents):
        log.info("calibration: %d of %d documents are empty", len(documents) - len(kept), len(documents))
    stretches = [(number, text) for number, document in enumerate(kept) for text in pieces(document)]
    tokens = _tokenized(stretches, tokenizer, None if limit is None else _POOL * limit * window, seed)
    end = getattr(tokenizer, "eos_token_id", None)
    joined: list[Tensor] = []
    before: tuple[int, int] | None = None
    for place in sorted(tokens):
        number = stretches[place][0]
        if before is not None and before != (place - 1, number) and end is not None:
            joined.append(torch.tensor([end]))
        joined.append(tokens[place])
        before = (place, number)
    return pack(torch.cat(joined) if joined else torch.zeros(0, dtype=torch.int64), window, limit, seed)


def _tokenized(
    stretches: Sequence[tuple[int, str]], tokenizer: Any, enough: int | None, seed: int
) -> dict[int, Tensor]:
    """Token ids of stretches by their place, in random order until there are enough."""
    order = list(range(len(stretches)))
    random.Random(seed).shuffle(order)
    found: dict[int, Tensor] = {}
    total = 0
    for place in order:
        if enough is not None and total >= enough:
            read, documents = {stretches[one][0] for one in found}, {number for number, _ in stretches}
            log.info("calibration: %d tokens are enough, %d documents not read", total, len(documents - read))
            break
        found[place] = tokenize(stretches[place][1], tokenizer)
        total += len(found[place])
    return found


def pack(ids: Tensor, window: int, limit: int | None, seed: int) -> list[Tensor]:
    """Cut token ids [tokens] into windows and draw at most `limit` of them.

    Raises: PtqcError if they do not fill one.
    """
    if window < 1:
        raise PtqcError(f"a calibration window takes at least one token, not {window}")
    if len(ids) < window:
        raise PtqcError(
            f"the calibration data has {len(ids)} tokens, one window takes {window}; give more, "
            "or batches of your own (tensors [rows, tokens]), which are taken as they are"
        )
    count = len(ids) // window
    windows = list(ids[: count * window].view(count, window))
    log.info("calibration: %d windows of %d tokens, %d tokens cut off", count, window, len(ids) - count * window)
    if limit is not None and count < limit:
        log.warning("calibration: %d windows were asked for, the data fills %d", limit, count)
    return draw(windows, limit, seed, "windows")


def draw(items: list[Any], limit: int | None, seed: int, what: str) -> list[Any]:
    """At most `limit` items, drawn at seeded random, in their order."""
    if limit is None or len(items) <= limit:
        return items
    log.info("calibration: %d of %d %s drawn with seed %d", limit, len(items), what, seed)
    return [items[place] for place in sorted(random.Random(seed).sample(range(len(items)), limit))]
