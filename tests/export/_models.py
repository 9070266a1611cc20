"""Small models of every family, quantized ones, and what llama.cpp makes of a file."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec

_SIZES = {
    "vocab_size": 4096,  # that of the reference tokenizer
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def small_model(family: str = "Llama", **changes) -> nn.Module:
    """A float32 model with random weights and gains; `changes` to its configuration."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(_SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def stored(weight: Tensor, spec: str, is_transposed: bool = False) -> QuantTensor:
    """The weight rounded to `spec`."""
    parsed = WeightSpec.parse(spec)
    method = METHODS.get("rtn")(symmetric=parsed.is_symmetric)
    return quantize_weight(weight, method, parsed, is_transposed=is_transposed)


def quantized(model: nn.Module, spec: str) -> nn.Module:
    """The model with every linear but the head rounded to `spec`, in place."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.weight = nn.Parameter(stored(module.weight, spec), requires_grad=False)
    return model


def llama_logits(path: Path, ids: list[int]) -> Tensor:
    """What llama.cpp computes, [tokens, vocabulary]: attention in float32, yarn as the file says."""
    llama_cpp = pytest.importorskip("llama_cpp")
    runner = llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, verbose=False, n_threads=2, n_threads_batch=2,
        type_k=0, type_v=0, yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,
    )  # fmt: skip
    runner.eval(ids)
    return torch.from_numpy(runner.scores[: len(ids)].copy())


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found - expected).norm() / expected.norm())
