"""The vocabulary of a GGUF file, read from a Hugging Face tokenizer.

Three kinds of tokenizer.json have a counterpart in llama.cpp:

    byte-level BPE                       "gpt2"    merges, and a name for the splitting
    BPE over characters, byte fallback   "llama"   SentencePiece: scores instead of merges
    unigram                              "t5"      scores, and the character map of the normalizer
"""

import base64
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType
from transformers import AutoTokenizer

from ptqc.codegen.export._gguf_splitting import PRE_NAMES, pre_name, steps
from ptqc.errors import ExportError

__all__ = ["Vocabulary", "read_vocabulary"]

_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
_SPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_UNUSED_SCORE = -10000.0


@dataclass(frozen=True)
class Vocabulary:
    """What `tokenizer.*` keys say. special: role ("bos") -> id. flags: `add_bos_token` and the like."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    special: Mapping[str, int] = field(default_factory=dict)
    charsmap: bytes = b""
    chat_template: str | Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


def read_vocabulary(tokenizer: Any, rows: int, pre: str | None = None, config: Any = None) -> Vocabulary:
    """Read a tokenizer (an object of transformers or tokenizers, or a folder or hub name).

    rows: of the embedding; ids without a token become unused ones. pre: llama.cpp's name for the splitting, where it
    cannot be told. config: of the model, for the special tokens the tokenizer does not name.

    Raises: ExportError for a tokenizer that llama.cpp has no counterpart of, or one with more tokens than rows.
    """
    tokenizer = _load(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise ExportError(
            f"{type(tokenizer).__name__} has no tokenizer.json; load it with AutoTokenizer, or save a fast tokenizer"
        )
    state = json.loads(backend.to_str())
    kind = _kind(state)
    special = _special(tokenizer, config, state["model"])
    tokens, types = _tokens(state, rows, kind, special.get("unk"))
    template = getattr(tokenizer, "chat_template", None)
    common = {"tokens": tokens, "types": types, "special": special, "chat_template": template}
    return _READERS[kind](state, pre, _added_ends(backend, special), common)


def _load(tokenizer: Any) -> Any:
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f'no tokenizer could be read from "{tokenizer}": {str(error).splitlines()[0]}') from error


def _kind(state: Mapping[str, Any]) -> str:
    model, pre_tokenizer = state["model"], steps(state["pre_tokenizer"])
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in pre_tokenizer):
        return "gpt2"
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model["type"] == "Unigram" and not model.get("byte_fallback"):
        return "t5"
    raise ExportError(
        f"llama.cpp has no counterpart of this {model['type']} tokenizer; it has byte-level BPE, BPE with byte "
        "fallback (SentencePiece), and unigram without byte fallback"
    )


def _special(tokenizer: Any, config: Any, model: Mapping[str, Any]) -> dict[str, int]:
    """Ids by role, as the tokenizer says, else its model (unknown), else the configuration."""
    unknown = model.get("unk_id")
    if model["type"] == "BPE" and model.get("unk_token"):
        unknown = model["vocab"].get(model["unk_token"])
    found = {}
    for role in _ROLES:
        said, configured = (getattr(source, f"{role}_token_id", None) for source in (tokenizer, config))
        claims = [said, unknown if role == "unk" else None, configured]
        ids = [claim[0] if isinstance(claim, list) else claim for claim in claims if claim not in (None, [])]
        if ids:
            found[role] = int(ids[0])
    return found


def _added_ends(backend: Any, special: Mapping[str, int]) -> dict[str, bool]:
    """Whether the tokenizer puts bos before and eos after a text, seen from what it does."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    return {
        "add_bos_token": len(full) > len(bare) and full[0] == special.get("bos"),
        "add_eos_token": len(full) > len(bare) and full[-1] == special.get("eos"),
    }


def _entries(model: Mapping[str, Any]) -> dict[int, str]:
    if model["type"] == "Unigram":
        return {index: piece for index, (piece, _) in enumerate(model["vocab"])}
    return {index: token for token, index in model["vocab"].items()}


def _tokens(state: Mapping[str, Any], rows: int, kind: str, unknown: int | None) -> tuple[list[str], list[int]]:
    entries = _entries(state["model"])
    added = {token["id"]: token for token in state.get("added_tokens", ())}
    largest = max(entries.keys() | added.keys())
    if largest >= rows:
        raise ExportError(
            f"the tokenizer has token {largest}, but the embedding has {rows} rows; resize_token_embeddings first"
        )
    tokens = [entries.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [TokenType.NORMAL if index in entries else TokenType.UNUSED for index in range(rows)]
    for index, token in added.items():
        is_plain = token["special"] or kind == "gpt2"
        tokens[index] = token["content"] if is_plain else token["content"].replace(_SPACE, " ")
        types[index] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    for index, text in enumerate(tokens):
        if kind == "llama" and _BYTE.fullmatch(text):
            types[index] = TokenType.BYTE
    if kind != "gpt2" and unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return _distinct(tokens), [int(kind) for kind in types]


def _distinct(tokens: list[str]) -> list[str]:
    """llama.cpp aborts the process on equal tokens; later ones get their id appended."""
    seen: set[str] = set()
    for index, token in enumerate(tokens):
        tokens[index] = token if token not in seen else f"{token}[{index}]"
        seen.add(tokens[index])
    return tokens


# -------------------------------------------------------------------- the three kinds


def _read_byte_level(state: Mapping[str, Any], pre: str | None, flags: dict[str, bool], common: Any) -> Vocabulary:
    model, notes = state["model"], []
    name = pre or pre_name(state["pre_tokenizer"], bool(model.get("ignore_merges")))
    normalizers = [step["type"] for step in steps(state["normalizer"])]
    if pre is None and (name is None or set(normalizers) - {"NFC"}):
        known = sorted({name for names in PRE_NAMES.values() for name in names.values()})
        raise ExportError(
            "llama.cpp has no name for how this tokenizer prepares its text (normalizer "
            f"{'+'.join(normalizers) or 'none'}, pre_tokenizer {json.dumps(state['pre_tokenizer'])}); "
            f"if one of its names fits, pass pre=..., for example {', '.join(known)}"
        )
    if normalizers:
        notes.append(f"llama.cpp does not apply the tokenizer's normalizer ({'+'.join(normalizers)})")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", name or "", merges=merges, flags=flags, notes=tuple(notes), **common)


def _read_sentencepiece(state: Mapping[str, Any], pre: str | None, flags: dict[str, bool], common: Any) -> Vocabulary:
    """Earlier merges score higher, which is the order SentencePiece made them in."""
    _refuse_normalizers(state, {"Prepend", "Replace"})
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    rank: dict[str, int] = {}
    for order, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, order)
    scores = [-float(rank.get(token, len(pairs))) for token in common["tokens"]]
    flags = {**flags, "add_space_prefix": _prepends_space(state)}
    always = any(step["type"] == "Metaspace" for step in steps(state["pre_tokenizer"])) and flags["add_space_prefix"]
    notes = ("llama.cpp puts a space before a text also where it begins with one",) if always else ()
    return Vocabulary("llama", pre or "default", scores=scores, flags=flags, notes=notes, **common)


def _read_unigram(state: Mapping[str, Any], pre: str | None, flags: dict[str, bool], common: Any) -> Vocabulary:
    _refuse_normalizers(state, {"Precompiled", "Replace", "Strip", "Prepend"})
    normalizers = steps(state["normalizer"])
    charsmaps = [step["precompiled_charsmap"] for step in normalizers if step["type"] == "Precompiled"]
    score = dict(enumerate(score for _, score in state["model"]["vocab"]))
    merges_spaces = any(step["type"] == "Replace" and step["pattern"].get("Regex") == " {2,}" for step in normalizers)
    return Vocabulary(
        "t5",
        pre or "default",
        scores=[score.get(index, _UNUSED_SCORE) for index in range(len(common["tokens"]))],
        flags={**flags, "add_space_prefix": _prepends_space(state), "remove_extra_whitespaces": merges_spaces},
        charsmap=base64.b64decode(charsmaps[0]) if charsmaps and charsmaps[0] else b"",
        **common,
    )


_READERS = {"gpt2": _read_byte_level, "llama": _read_sentencepiece, "t5": _read_unigram}


def _refuse_normalizers(state: Mapping[str, Any], known: set[str]) -> None:
    unknown = {step["type"] for step in steps(state["normalizer"])} - known
    if unknown:
        raise ExportError(f"llama.cpp does not do what this tokenizer's normalizer does: {', '.join(sorted(unknown))}")


def _prepends_space(state: Mapping[str, Any]) -> bool:
    prepends = any(step["type"] == "Prepend" for step in steps(state["normalizer"]))
    return prepends or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in steps(state["pre_tokenizer"])
    )
