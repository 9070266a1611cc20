"""Against llama.cpp itself: the same types in every mix, and errors no larger than its quantizer's."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from ptqc.codegen.export._gguf_blocks import TYPES
from ptqc.codegen.export._gguf_mixes import MIXES
from ptqc.codegen.exporters import export
from tests.export import _llama_cpp
from tests.export._models import EXPERTS, small_model
from tests.export.test_gguf_tokenizer import byte_level

pytest.importorskip("llama_cpp")
SIZES = {"vocab_size": 700, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 20, "head_dim": 32}
CODED = [name for name, kind in TYPES.items() if kind.spec is not None]


MODELS = {
    "plain": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "tied, grouped": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "odd rows": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 288}),
    "experts": ("Mixtral", EXPERTS | {"num_local_experts": 8, "num_key_value_heads": 4, "num_hidden_layers": 8}),
    "shared expert": ("Qwen2Moe", EXPERTS | {"moe_intermediate_size": 256, "num_hidden_layers": 8}),
    "transposed": ("GPT2", {"num_hidden_layers": 8}),
}
# llama.cpp makes Q2_K_S only with an imatrix.
QUANTS = [name for name in MIXES if name not in ("F32", "F16", "BF16", "Q2_K_S")]
CASES = [
    *((name, quant) for name in ("plain", "tied, grouped", "odd rows") for quant in QUANTS),
    *((name, quant) for name in ("experts", "shared expert", "transposed") for quant in ("Q2_K", "Q3_K_M", "Q4_K_M")),
]


@pytest.fixture(scope="module")
def model_and_file(request, tmp_path_factory):
    family, changes = MODELS[request.param]
    model, path = small_model(family, **(SIZES | changes)), tmp_path_factory.mktemp("source") / "f32.gguf"
    export(model, "gguf", path, quant="F32", tokenizer=byte_level())
    return model, path


@pytest.mark.slow
@pytest.mark.parametrize(("model_and_file", "quant"), CASES, indirect=["model_and_file"])
def test_mixes_have_the_types_that_llama_cpp_chooses(tmp_path, model_and_file, quant):
    model, source = model_and_file
    _llama_cpp.quantize_file(source, tmp_path / "theirs.gguf", MIXES[quant].file_type)
    export(model, "gguf", tmp_path / "ours.gguf", quant=quant, tokenizer=byte_level())
    ours, theirs = _llama_cpp.types_in(tmp_path / "ours.gguf"), _llama_cpp.types_in(tmp_path / "theirs.gguf")
    assert ours == theirs


def error(encoded, weights, name, counted):
    left = gguf.quants.dequantize(encoded, GGMLQuantizationType[name]) - weights
    return float((np.square(left, dtype=np.float64) * counted).sum())


@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("name", CODED)
def test_errors_are_no_larger_than_those_of_its_quantizer(name, has_importance):
    random = np.random.default_rng(0)
    ratios = []
    for weights in (random.standard_normal((64, 512)), random.standard_t(4, (64, 512))):
        weights = (weights / 20).astype(np.float32)
        importance = np.exp(random.standard_normal(512)).astype(np.float32) if has_importance else None
        counted = 1 if importance is None else importance
        ours = error(TYPES[name].encode(weights, importance), weights, name, counted)
        ratios.append(ours / error(_llama_cpp.encode(weights, name, importance), weights, name, counted))
    assert np.mean(ratios) <= 1.0
