"""What is traced for an ONNX file: a module, how to call it, and what its inputs and outputs are called.

A causal language model of transformers goes from tokens to logits. With a cache it also takes the keys and values of
the tokens before, and gives those of all tokens, under the names that optimum and onnxruntime-genai use:

    input_ids [batch, sequence] int64, attention_mask [batch, past + sequence] int64,
    past_key_values.<layer>.key and .value [batch, heads, past, head_dim]
        -> logits [batch, sequence, vocabulary],
           present.<layer>.key and .value [batch, heads, past + sequence, head_dim]

`past` may be 0: then it is the first pass.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ptqc.errors import ExportError

__all__ = ["Trace", "language_model", "plain_module", "refuse_unknown_inputs"]

_BATCH, _SEQUENCE, _PAST = 2, 5, 3

Axes = dict[int, str]


@dataclass(frozen=True)
class Trace:
    """A module and how to call it. inputs: by keyword; lists of pairs of tensors are inputs one by one. axes: in the
    same structure, the axes of any size and their names. names: of all inputs and of all outputs, in order; outputs ()
    where the exporter may name them. prefix: of the names of the model's parameters in the module."""

    module: nn.Module
    inputs: Mapping[str, Any]
    axes: Mapping[str, Any]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def flat_axes(self) -> list[Axes]:
        """The axes of every input, in the order of `input_names`."""
        found: list[Axes] = []
        for axes in self.axes.values():
            found += [one for pair in axes for one in pair] if isinstance(axes, list) else [axes]
        return found


def plain_module(model: nn.Module, given: Mapping[str, Tensor] | Sequence[Tensor]) -> Trace:
    """Any module, called with these inputs; the first axis of each is of any size."""
    inputs = given if isinstance(given, Mapping) else inspect.signature(model.forward).bind(*given).arguments
    axes = {name: {0: "batch"} if value.ndim > 0 else {} for name, value in inputs.items()}
    return Trace(model, inputs, axes, tuple(inputs))


def refuse_unknown_inputs(model: nn.Module) -> None:
    """Raises: ExportError unless it is a causal language model."""
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    if not (callable(can_generate) and can_generate()) or getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"how to call a {type(model).__name__} is unknown (only causal language models of transformers are): "
            "pass example_inputs=, a tuple or a dict of tensors"
        )


class _Logits(nn.Module):
    """A language model from tokens to logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


class _WithCache(nn.Module):
    """A language model that goes on behind the keys and values of earlier tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        cache = DynamicCache(ddp_cache_data=past_key_values)
        made = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        )  # fmt: skip
        return made.logits, [each for layer in made.past_key_values.layers for each in (layer.keys, layer.values)]


def language_model(model: nn.Module, *, takes_mask: bool, has_cache: bool) -> Trace:
    """A causal language model.

    Raises: ExportError for a cache that is not keys and values of every layer.
    """
    ids = torch.arange(_BATCH * _SEQUENCE, device=next(model.parameters()).device).view(_BATCH, _SEQUENCE)
    inputs: dict[str, Any] = {"input_ids": ids}
    axes: dict[str, Any] = {"input_ids": {0: "batch", 1: "sequence"}}
    if takes_mask:
        inputs["attention_mask"] = ids.new_ones(_BATCH, _SEQUENCE + (_PAST if has_cache else 0))
        axes["attention_mask"] = {0: "batch", 1: "past + sequence" if has_cache else "sequence"}
    if not has_cache:
        return Trace(_Logits(model), inputs, axes, tuple(inputs), ("logits",), "model.")
    past = _example_cache(model, ids[:, :_PAST])
    inputs["past_key_values"] = past
    axes["past_key_values"] = [({0: "batch", 2: "past"}, {0: "batch", 2: "past"}) for _ in past]
    kinds = [f"{layer}.{kind}" for layer in range(len(past)) for kind in ("key", "value")]
    names = [name for name in inputs if name != "past_key_values"] + [f"past_key_values.{kind}" for kind in kinds]
    return Trace(
        _WithCache(model), inputs, axes, tuple(names), ("logits", *(f"present.{kind}" for kind in kinds)), "model."
    )


def _example_cache(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    layers = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in getattr(cache, "layers", ())]
    pairs = [(k, v) for k, v in layers if isinstance(k, Tensor) and isinstance(v, Tensor) and k.ndim == v.ndim == 4]
    if not pairs or len(pairs) != len(layers):
        raise ExportError(
            f"what {type(model).__name__} keeps between tokens is not one key and one value for every layer; "
            "export it without (cache=False)"
        )
    return [(k.clone(), v.clone()) for k, v in pairs]
