import json

import pytest
from tokenizers import Regex, pre_tokenizers

from ptqc.codegen.export._gguf_splitting import PRE_NAMES, pre_name, splitting, steps


def state(pre_tokenizer):
    return json.loads(pre_tokenizer.__getstate__())


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def test_the_plain_byte_level_step_is_gpt_2():
    assert pre_name(state(byte_level()), False) == "gpt-2"


def test_digits_before_it_are_another_splitting():
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    assert pre_name(state(digits), False) == "smollm"


def test_expressions_are_compared_and_whether_merges_are_ignored():
    expression = next(key for key, names in PRE_NAMES.items() if "llama-bpe" in names.values())[0]
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    pipeline = state(pre_tokenizers.Sequence([split, byte_level(use_regex=False)]))
    assert splitting(pipeline) == (expression,)
    assert pre_name(pipeline, True) == "llama-bpe"
    assert pre_name(pipeline, False) == "dbrx"


@pytest.mark.parametrize(
    "other",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), byte_level()]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\w+"), "isolated"), byte_level(use_regex=False)]),
        pre_tokenizers.Sequence([pre_tokenizers.Split("x", "isolated"), byte_level()]),
    ],
)
def test_other_splittings_have_no_name(other):
    assert pre_name(state(other), False) is None


def test_steps_flatten_sequences():
    nested = pre_tokenizers.Sequence([pre_tokenizers.Sequence([byte_level()]), pre_tokenizers.Digits()])
    assert [step["type"] for step in steps(state(nested))] == ["ByteLevel", "Digits"]
    assert steps(None) == []
