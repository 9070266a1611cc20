"""Small random transformers models, one for each way in which parameters are stored, tied or merged."""

import torch
import transformers

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 128}

MODELS = {
    "plain": ("LlamaForCausalLM", "LlamaConfig", _SIZES),
    "tied": ("LlamaForCausalLM", "LlamaConfig", _SIZES | {"tie_word_embeddings": True}),
    "transposed": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "experts": ("MixtralForCausalLM", "MixtralConfig", _SIZES | _EXPERTS),
    "mixed": ("T5ForConditionalGeneration", "T5Config", _T5),
}
IDS = torch.arange(16)[None]


def tiny(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model with seeded weights, in evaluation mode."""
    architecture, config, sizes = MODELS[name]
    torch.manual_seed(0)
    # Not .to(dtype): that would round buffers too that no checkpoint holds (the frequencies of rotary embeddings).
    return getattr(transformers, architecture)._from_config(getattr(transformers, config)(**sizes), dtype=dtype).eval()


@torch.no_grad()
def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    """What the model says to `IDS`."""
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits
