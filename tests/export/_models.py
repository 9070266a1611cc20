"""Small models of every family, quantized ones, and what llama.cpp makes of a file."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from ptqc.codegen.export._gguf_architectures import architecture_of
from ptqc.codegen.export._gguf_placement import placements
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


EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
"""Of layers with experts, however their number is called."""


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


def decoded(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """What the `gguf` package makes of the tensors of a file, by the names and in the shapes of the model."""
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights: dict[str, Tensor] = {}
    for at in placements(architecture_of(model), model):
        tensor = read[at.stored_name]
        whole = weights.setdefault(at.name, torch.empty(model.get_parameter(at.name).shape))
        held = whole.mT.contiguous() if at.is_transposed else whole
        rows = held if len(at.shape) == 1 else held.view(-1, at.shape[-1])
        numbers = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        assert tuple(tensor.shape[::-1]) == at.shape
        rows[slice(None) if at.rows is None else at.rows] = numbers.view(-1, *rows.shape[1:]) - at.offset
        whole.copy_(held.mT if at.is_transposed else held)
    return weights


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
