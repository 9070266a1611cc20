"""ONNX: the graph of one forward pass with float weights; stored weights enter it decoded.

A causal language model of transformers becomes a graph from tokens to logits, of any batch size and length:

    input_ids [batch, sequence] int64, attention_mask [batch, sequence] int64 -> logits [batch, sequence, vocabulary]

Any other module needs `example_inputs`; the first axis of every input is then of any size.
"""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnxscript  # noqa: F401 - torch.onnx.export needs it, and would say so only after tracing
import torch
from torch import Tensor, nn

from ptqc.codegen.exporters import EXPORTERS, ExportedTensor, Fate, Written
from ptqc.errors import ExportError
from ptqc.qtensor import QuantTensor

__all__ = ["ONNX"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Trace:
    """A module and how to call it. axes: per input, the axes of any size and their names."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...] | None = None


@EXPORTERS.register("onnx")
@dataclass(frozen=True)
class ONNX:
    """Writes ONNX.

    example_inputs: tensors to trace with, by position or by name. attention_mask: whether a language model takes one.
    dtype: of the weights ("float32", "float16", "bfloat16"); None keeps float16 and float32, and widens bfloat16, which
    ONNX Runtime does not compute on CPUs. external_data: weights in a second file, `<name>.data`; None: where one file
    cannot hold them (2 GB).
    """

    example_inputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None
    attention_mask: bool = True
    dtype: str | None = None
    external_data: bool | None = None

    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self) -> None:
        if self.dtype not in (None, *_DTYPES):
            raise ExportError(f"onnx writes no {self.dtype!r} weights; dtype may be {', '.join(_DTYPES)}")

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """Nothing: every weight can be decoded."""
        return None

    def prepare(self, model: nn.Module, tokenizer: Any) -> Callable[[Path], Written]:
        """See `ptqc.codegen.exporters.Exporter`; a graph holds no tokenizer."""
        if self.example_inputs is None:
            _refuse_unknown_inputs(model)
        plain, tensors = decoded_copy(model, self.dtype)
        trace = _language_model(plain, self.attention_mask) if self.example_inputs is None else self._module(plain)
        return lambda path: self._write(trace, path, tensors)

    def _module(self, model: nn.Module) -> _Trace:
        given = self.example_inputs
        assert given is not None
        inputs = given if isinstance(given, Mapping) else inspect.signature(model.forward).bind(*given).arguments
        return _Trace(model, inputs, {name: {0: "batch"} for name, value in inputs.items() if value.ndim > 0})

    def _write(self, trace: _Trace, path: Path, tensors: tuple[ExportedTensor, ...]) -> Written:
        try:
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    trace.module,
                    kwargs=dict(trace.inputs),
                    dynamic_shapes={name: dict(trace.axes.get(name, {})) for name in trace.inputs},
                    input_names=list(trace.inputs),
                    output_names=trace.outputs,
                    dynamo=True,
                    verbose=False,
                )
            assert program is not None
            program.save(path, external_data=self.external_data)
            onnx.checker.check_model(str(path), full_check=True)
        except (torch.onnx.OnnxExporterError, onnx.checker.ValidationError) as error:
            raise ExportError(f"the model does not become an ONNX graph: {str(error).splitlines()[0]}") from error
        return Written(tensors)


class _Logits(nn.Module):
    """A language model from tokens to logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _language_model(model: nn.Module, takes_mask: bool) -> _Trace:
    ids = torch.arange(16, device=next(model.parameters()).device).view(2, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if takes_mask else {"input_ids": ids}
    return _Trace(_Logits(model), inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}, ("logits",))


def _refuse_unknown_inputs(model: nn.Module) -> None:
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    if not (callable(can_generate) and can_generate()) or getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"how to call a {type(model).__name__} is unknown (only causal language models of transformers are): "
            "pass example_inputs=, a tuple or a dict of tensors"
        )


def decoded_copy(model: nn.Module, dtype: str | None) -> tuple[nn.Module, tuple[ExportedTensor, ...]]:
    """A copy of a model in evaluation mode, float weights shared with it and stored ones decoded.

    dtype: of the weights and saved buffers; None keeps it, bfloat16 excepted. Tied weights stay tied.
    """
    replaced: dict[int, Any] = {}
    tensors = []
    for name, weight in model.named_parameters():
        decoded = weight.dequantize() if isinstance(weight, QuantTensor) else weight.detach()
        plain = _cast(decoded, dtype)
        replaced[id(weight)] = nn.Parameter(plain, requires_grad=False)
        fate: Fate = "lossless" if torch.promote_types(plain.dtype, decoded.dtype) == plain.dtype else "converted"
        stored_as = str(plain.dtype).removeprefix("torch.")
        tensors.append(ExportedTensor(name, name, stored_as, fate, plain.numel() * plain.element_size()))
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        replaced[id(buffer)] = _cast(buffer, dtype) if name in saved else buffer
    return copy.deepcopy(model, replaced).eval(), tuple(tensors)


def _cast(tensor: Tensor, dtype: str | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if dtype is None:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return tensor.to(_DTYPES[dtype])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch.onnx says about itself: packages it does not need, its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
