"""How a byte-level BPE tokenizer splits text before merging, and llama.cpp's name for that (`tokenizer.ggml.pre`).

A tokenizer.json describes the splitting as a pipeline; every step of it is a regular expression whose matches become
pieces. The tuple of these expressions is looked up in PRE_NAMES. llama.cpp compiles its own variant of each, so a
splitting it has no name for cannot be written, only overridden by hand.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["PRE_NAMES", "pre_name", "splitting", "steps"]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
)

PRE_NAMES: dict[tuple[str, ...], dict[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (_DIGIT, _GPT2): {False: "smollm"},
    (_LLAMA3,): {True: "llama-bpe", False: "dbrx"},
    (_QWEN2,): {False: "qwen2"},
    (_TEKKEN,): {True: "tekken"},
    (_GPT4O,): {False: "gpt-4o"},
}
"""Splitting -> whether whole pieces of the vocabulary skip the merges (`ignore_merges`) -> name."""


def steps(pipeline: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The flat list of steps of a normalizer or pre-tokenizer."""
    if pipeline is None:
        return []
    inner = pipeline.get("normalizers") or pipeline.get("pretokenizers")
    return [pipeline] if inner is None else [step for part in inner for step in steps(part)]


def splitting(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level pre-tokenizer, in order; None if a step is not one."""
    expressions = [_expression(step) for step in steps(pre_tokenizer)]
    return None if None in expressions else tuple(expression for expression in expressions if expression)


def _expression(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return _GPT2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return _DIGIT
    if step["type"] == "Split" and (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True)):
        expression: str | None = step["pattern"].get("Regex")
        return expression
    return None


def pre_name(pre_tokenizer: Mapping[str, Any] | None, ignores_merges: bool) -> str | None:
    """llama.cpp's name for a splitting, or None if it has none."""
    names = PRE_NAMES.get(splitting(pre_tokenizer) or ())
    return None if names is None else names.get(ignores_merges)
