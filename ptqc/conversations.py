"""Conversations as calibration data: lists of messages, rendered by the chat template of the tokenizer.

A message is a mapping with "role" and "content", or with "from" and "value" as older data sets have it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ptqc.errors import PtqcError, first_line

__all__ = ["COLUMNS", "Conversation", "is_conversation", "render"]

Conversation = list[dict[str, Any]]

COLUMNS = ("messages", "conversations", "conversation")
"""Columns of data sets that hold conversations."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def is_conversation(item: Any) -> bool:
    """Whether an object is a list of messages."""
    return isinstance(item, (list, tuple)) and bool(item) and all(_is_message(message) for message in item)


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())


def render(documents: Sequence[str | Conversation], tokenizer: Any) -> list[str]:
    """Documents as text: conversations through the tokenizer's chat template, texts as they are.

    Raises: PtqcError if the tokenizer has no template, or the template refuses a conversation (naming which).
    """
    return [
        document if isinstance(document, str) else _rendered(number, document, tokenizer)
        for number, document in enumerate(documents, 1)
    ]


def _rendered(number: int, conversation: Conversation, tokenizer: Any) -> str:
    if tokenizer is None:
        raise PtqcError("calibration conversations need the model's tokenizer (tokenizer=...)")
    if not getattr(tokenizer, "chat_template", None):
        raise PtqcError(
            "the calibration data holds conversations, and the tokenizer has no chat template; "
            "set tokenizer.chat_template, or give texts"
        )
    try:
        return str(tokenizer.apply_chat_template([_message(one) for one in conversation], tokenize=False))
    except Exception as error:  # a template is a program of its own, and says in its own way what it refuses
        reason = first_line(error)
        raise PtqcError(f"the chat template refuses conversation {number} of the calibration data: {reason}") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    if "role" in message:
        return dict(message)
    return {"role": _ROLES.get(str(message["from"]), str(message["from"])), "content": message["value"]}
