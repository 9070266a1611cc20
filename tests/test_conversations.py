"""Conversations: what is one, and how it becomes text."""

import pytest

from ptqc.conversations import is_conversation, render
from ptqc.errors import PtqcError

TALK = [{"role": "user", "content": "a bb"}, {"role": "assistant", "content": "ccc"}]


class Tokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        if messages[0]["role"] != "user":
            raise ValueError("the first message must be the user's\nat line 3")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def test_what_is_a_conversation():
    assert is_conversation(TALK) and is_conversation(tuple(TALK))
    assert is_conversation([{"from": "human", "value": "a"}])
    assert not any(is_conversation(item) for item in ([], "a", TALK[0], [[1, 2]], [{"input_ids": [1]}], None))


def test_conversations_go_through_the_template():
    old = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert render(["text", TALK, old], Tokenizer()) == ["text", "<user>a bb<assistant>ccc", "<user>a<assistant>b"]


def test_texts_need_no_tokenizer():
    assert render(["text"], None) == ["text"]


def test_what_is_wrong_is_said():
    with pytest.raises(PtqcError, match="need the model's tokenizer"):
        render([TALK], None)
    with pytest.raises(PtqcError, match=r"no chat template; set tokenizer\.chat_template, or give texts"):
        render([TALK], object())
    with pytest.raises(PtqcError, match="refuses conversation 2 of the calibration data: the first message") as caught:
        render([TALK, TALK[1:]], Tokenizer())
    assert "\n" not in str(caught.value)


def test_a_real_template():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    assert render([TALK], tokenizer) == ["[user] a bb [assistant] ccc "]
