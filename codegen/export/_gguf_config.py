"""From the metadata of a GGUF file to a transformers configuration: the fields of the architecture, read backwards."""

import math
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGUFValueType, Keys

from ptqc.codegen.export._gguf_architectures import ARCHITECTURES
from ptqc.codegen.export._gguf_family import Architecture
from ptqc.codegen.export._gguf_parse import Contents
from ptqc.codegen.export._gguf_rotary import rotary_factors
from ptqc.errors import CheckpointError

__all__ = ["configuration"]

_EMBEDDING, _HEAD, _ROTARY = "token_embd.weight", "output.weight", "rope_freqs.weight"
_SPECIAL = {
    "bos_token_id": Keys.Tokenizer.BOS_ID,
    "eos_token_id": Keys.Tokenizer.EOS_ID,
    "pad_token_id": Keys.Tokenizer.PAD_ID,
}


def configuration(contents: Contents) -> tuple[Architecture, Any]:
    """The architecture, and the configuration of its model.

    Raises: CheckpointError for an architecture that is not known, or metadata that do not describe one.
    """
    name = contents.metadata.get(Keys.General.ARCHITECTURE)
    kinds = sorted((kind for kind, row in ARCHITECTURES.items() if row.name == name), key=partial(_silence, contents))
    if not kinds:
        known = ", ".join(sorted({row.name for row in ARCHITECTURES.values()}))
        raise CheckpointError(f"{contents.path} is of architecture {name!r}; those that can be read: {known}")
    architecture = ARCHITECTURES[kinds[0]]
    settings = _settings(contents, architecture)
    _check_layers(contents, settings)
    settings |= {row: contents.metadata.get(key) for row, key in _SPECIAL.items()}
    if architecture.is_rotated:
        settings["rope_parameters"] = _rotary(contents, architecture, settings)
    try:
        said = SimpleNamespace(**settings)
        settings |= {key: rule(said) if callable(rule) else rule for key, rule in architecture.fixed.items()}
        settings |= _from_tensors(contents)
        config = transformers.AutoConfig.for_model(kinds[0], **settings)
    except Exception as error:  # hostile values fail anywhere in transformers, in any way
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{contents.path} describes no {name} model: {reason}") from error
    return architecture, _with_factors(config, contents)


def _silence(contents: Contents, kind: str) -> int:
    """Less for families whose keys the file has: experts, sliding windows."""
    architecture = ARCHITECTURES[kind]
    values = [contents.metadata.get(field.key.format(arch=architecture.name)) for field in architecture.fields]
    return -sum(isinstance(value, (int, float)) and value != 0 for value in values)


_UNBOUNDED = frozenset({"max_position_embeddings", "sliding_window", "num_hidden_layers"})
"""Settings that no tensor is as wide as; nothing is allocated by them (layers are counted first)."""


def _settings(contents: Contents, architecture: Architecture) -> dict[str, Any]:
    found: dict[str, Any] = {}
    widest = max((max(at.shape) for at in contents.tensors.values()), default=0)
    for field in architecture.fields:
        value = contents.metadata.get(field.key.format(arch=architecture.name))
        if field.attribute is None or value is None:
            continue
        if isinstance(value, bool) and field.kind == GGUFValueType.BOOL:
            found[field.attribute] = value
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise CheckpointError(f"{contents.path} has {value!r} as {field.key.format(arch=architecture.name)}")
        if field.attribute not in _UNBOUNDED and value > widest:
            raise CheckpointError(f"{contents.path} announces {field.attribute} {value}, no tensor in it is as wide")
        found[field.attribute] = value
    if _EMBEDDING not in contents.tensors:
        raise CheckpointError(f"{contents.path} has no {_EMBEDDING}: it holds no language model")
    found["vocab_size"] = contents.tensors[_EMBEDDING].shape[0]
    found["tie_word_embeddings"] = _HEAD not in contents.tensors
    return found


def _check_layers(contents: Contents, settings: Mapping[str, Any]) -> None:
    """A model is built layer by layer, so their number must be true."""
    numbers = [name.split(".")[1] for name in contents.tensors if name.startswith("blk.") and name.count(".") >= 2]
    layers = 1 + max((int(number) for number in numbers if number.isdecimal() and len(number) < 6), default=-1)
    if settings.get("num_hidden_layers") != layers:
        said = settings.get("num_hidden_layers")
        raise CheckpointError(f"{contents.path} announces {said} layers and holds tensors of {layers}")


_QUERY_BIASES = frozenset({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"})


def _from_tensors(contents: Contents) -> dict[str, Any]:
    """Settings that show in which tensors there are."""
    return {
        **dict.fromkeys(("attention_bias", "use_qkv_bias"), bool(_QUERY_BIASES & contents.tensors.keys())),
        **dict.fromkeys(("mlp_bias", "use_bias"), "blk.0.ffn_down.bias" in contents.tensors),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in contents.tensors,
    }


def _rotary(contents: Contents, architecture: Architecture, settings: Mapping[str, Any]) -> dict[str, Any]:
    def key(name: str, default: Any = None) -> Any:
        return contents.metadata.get(name.format(arch=architecture.name), default)

    parameters = {"rope_type": "default", "rope_theta": key(Keys.Rope.FREQ_BASE, 10000.0)}
    kind = key(Keys.Rope.SCALING_TYPE, "none")
    if kind in ("linear", "yarn"):
        factor = key(Keys.Rope.SCALING_FACTOR, 1.0)
        parameters |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            if not isinstance(factor, float) or not 1 <= factor < 1e6:
                raise CheckpointError(f"{contents.path} scales its rotary frequencies by {factor!r}")
            attention = key(Keys.Rope.SCALING_ATTN_FACTOR, 1.0) * (0.1 * math.log(factor) + 1)
            context = key(Keys.Rope.SCALING_ORIG_CTX_LEN, settings.get("max_position_embeddings"))
            parameters |= {"attention_factor": attention, "original_max_position_embeddings": context}
    elif kind not in ("none", "default", ""):
        raise CheckpointError(f"{contents.path} scales its rotary frequencies as {kind!r}; linear and yarn can be read")
    rotated, head = key(Keys.Rope.DIMENSION_COUNT), settings.get("head_dim")
    if architecture.rotates_partly and isinstance(rotated, int) and head:
        parameters["partial_rotary_factor"] = rotated / head
    narrow = key(Keys.Rope.FREQ_BASE_SWA)
    if narrow is not None:
        sliding = {"rope_type": "default", "rope_theta": narrow}
        return {"full_attention": parameters, "sliding_attention": sliding}
    return parameters


_CONTEXTS = tuple(2**power for power in range(5, 21))


def _with_factors(config: Any, contents: Contents) -> Any:
    """Find the llama3 scaling whose factors a tensor holds: the parameters themselves are not in the file."""
    if _ROTARY not in contents.tensors:
        return config
    wanted = torch.from_numpy(np.array(contents.read_floats(_ROTARY)).reshape(-1))
    base = dict(config.rope_parameters)
    factor = float(wanted.max())
    for context in _CONTEXTS:
        for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0)):
            config.rope_parameters = base | {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }  # fmt: skip
            found = rotary_factors(config)
            if found is not None and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4):
                return config
    raise CheckpointError(f"{contents.path} has rotary factors ({_ROTARY}) that no llama3 scaling gives")
