import base64
import json
from pydoc_data.topics import topics

import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from ptqc.codegen.export._gguf_family import Metadata
from ptqc.codegen.export._gguf_file import write_file
from ptqc.codegen.export._gguf_splitting import PRE_NAMES
from ptqc.codegen.export._gguf_tokenizer import read_vocabulary
from ptqc.errors import ExportError

TEXT = "\n\n".join(topics[key] for key in sorted(topics))[:60000]
HARD = (
    "\n \n\n \t\t \t\n    \n🚀 (normal) 😶‍🌫️ ✅ 3 33 333 3333 33333 3.3 3..3 កាន់តែពិសេស "
    "?我想在apple工作1314151天～ ----=== нещо "
    "''''```\"\"......!!!!?????? I've been 'told he's there, 'RE you sure? We'Ve a'lL <X> é́ Ünïcode\r\n\r\n"
    "CamelCaseWords def f(x):\n\treturn x/2//3 <X>"
)


def byte_level(splitting=None, ignore_merges=False, size=600):
    """A byte-level BPE tokenizer; splitting: a key of PRE_NAMES."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    expressions = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in splitting or ()]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expressions)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*expressions, level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<X>", normalized=False)])
    return tokenizer


def sentencepiece(**parts):
    """A BPE tokenizer with byte fallback, as SentencePiece makes them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=pieces))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=400, show_progress=False, special_tokens=["</s>", "<unk>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def test_the_reference_tokenizer(reference_folder):
    found = read_vocabulary(reference_folder, 4096)
    tokenizer = AutoTokenizer.from_pretrained(reference_folder)
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.tokens == tokenizer.convert_ids_to_tokens(range(4096))
    assert found.types == [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 4094
    assert found.special == {"bos": 0, "eos": 1}
    assert found.merges is not None
    assert found.merges[0] == "Ġ Ġ"
    assert found.flags == {"add_bos_token": False, "add_eos_token": False}
    assert read_vocabulary(tokenizer, 4096) == found
    assert read_vocabulary(str(reference_folder), 4096) == found


def test_rows_without_a_token_become_unused_ones():
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    found = read_vocabulary(tokenizer, size + 2)
    assert found.tokens[size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert found.types[size:] == [TokenType.UNUSED] * 2
    assert found.types[size - 1] == TokenType.USER_DEFINED
    assert found.tokens[size - 1] == "<X>"


def test_equal_tokens_are_told_apart():
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"[PAD{size + 1}]"])
    found = read_vocabulary(tokenizer, size + 3)
    assert len(set(found.tokens)) == size + 3


def test_more_tokens_than_rows_are_an_error():
    with pytest.raises(ExportError, match=r"has token 600, but the embedding has 600 rows"):
        read_vocabulary(byte_level(), 600)


def test_whether_ends_are_added_is_seen_from_what_the_tokenizer_does():
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])

    class Configuration:
        bos_token_id, eos_token_id = 0, [1, 5]

    found = read_vocabulary(tokenizer, 601, config=Configuration())
    assert found.flags == {"add_bos_token": True, "add_eos_token": False}
    assert found.special == {"bos": 0, "eos": 1}


def test_an_unknown_splitting_is_an_error_unless_it_is_named():
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ExportError, match=r"no name for how.*pass pre=.*gpt-2"):
        read_vocabulary(tokenizer, 601)
    assert read_vocabulary(tokenizer, 601, pre="gpt-2").pre == "gpt-2"


def test_a_normalizer_is_refused_or_noted():
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    assert "NFC" in read_vocabulary(tokenizer, 601).notes[0]
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ExportError, match=r"Lowercase"):
        read_vocabulary(tokenizer, 601)


def test_sentencepiece_scores_follow_the_merges():
    tokenizer = sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False))
    found = read_vocabulary(tokenizer, 700)
    left, right = json.loads(tokenizer.to_str())["model"]["merges"][3]
    assert (found.model, found.flags["add_space_prefix"]) == ("llama", True)
    assert found.scores is not None
    assert found.scores[tokenizer.token_to_id(left + right)] == -3.0
    assert found.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert found.special["unk"] == 0
    gemma_like = sentencepiece(normalizer=normalizers.Replace(" ", "▁"))
    assert read_vocabulary(gemma_like, 700).flags["add_space_prefix"] is False


def test_unigram_keeps_its_scores_and_character_map():
    tokenizer = unigram()
    size = tokenizer.get_vocab_size()
    found = read_vocabulary(tokenizer, size)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    assert (found.model, found.scores) == ("t5", [score for _, score in vocabulary])
    assert found.special["unk"] == tokenizer.token_to_id("<unk>") == 1
    assert found.types[:2] == [TokenType.CONTROL, TokenType.UNKNOWN]

    class Mapped:
        def to_str(self):
            state = json.loads(tokenizer.to_str())
            charsmap = base64.b64encode(b"map").decode()
            return json.dumps(state | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}})

        def encode(self, *args, **kwargs):
            return tokenizer.encode(*args, **kwargs)

    assert read_vocabulary(Mapped(), size).charsmap == b"map"


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"no counterpart of this WordLevel"):
        read_vocabulary(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), 1)
    with pytest.raises(ExportError, match=r"object has no tokenizer.json"):
        read_vocabulary(object(), 1)
    with pytest.raises(ExportError, match=r"no tokenizer could be read from"):
        read_vocabulary(tmp_path, 1)


KINDS = {
    **{name: (lambda key=key, skip=skip: byte_level(key, skip))
       for key, names in PRE_NAMES.items() for skip, name in names.items()},
    "sentencepiece": lambda: sentencepiece(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "sentencepiece-metaspace": lambda: sentencepiece(
        pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    ),
    "sentencepiece-bare": lambda: sentencepiece(normalizer=normalizers.Replace(" ", "▁")),
    "unigram": unigram,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same_ids(tmp_path, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = KINDS[kind]()
    keys = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    rows = [Metadata(f"llama.{key}", GGUFValueType.UINT32, 32) for key in keys]
    rows.append(Metadata("llama.attention.layer_norm_rms_epsilon", GGUFValueType.FLOAT32, 1e-5))
    vocabulary = read_vocabulary(tokenizer, tokenizer.get_vocab_size() + 3)
    write_file(tmp_path / "v.gguf", "llama", rows, vocabulary, [])
    runner = llama_cpp.Llama(str(tmp_path / "v.gguf"), vocab_only=True, verbose=False)
    # Runs of one character have unigram splittings of equal score, and the two sides break such ties differently.
    text = TEXT[:20000] if kind != "unigram" else TEXT[:20000].replace("*", "").replace("=", "")
    for sample in (text, HARD):
        found = runner.tokenize(sample.encode(), add_bos=False, special=True)
        assert found == tokenizer.encode(sample, add_special_tokens=False).ids
