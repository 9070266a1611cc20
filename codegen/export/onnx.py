"""ONNX: the graph of one pass of the model, with stored weights in the operators that runtimes have for them.

A causal language model becomes a graph from tokens, and the keys and values of the tokens before, to logits (see
`_onnx_trace`); any other module needs `example_inputs`. Linears with integer weights become `MatMulNBits` of ONNX
Runtime, those with 4-bit codebooks of bitsandbytes its `MatMulBnb4`; or both DequantizeLinear and MatMul of the ONNX
standard, where that has the form; those with int8 weights and inputs `MatMulInteger`. All other weights (lattices, more
codebooks, blocks of rows, experts, embeddings) are codes that ordinary operators decode, and the report says so.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_ir as ir
import onnxscript  # noqa: F401 - torch.onnx.export needs it, and would say so only after tracing
import torch
from torch import Tensor, nn
from torch.export import Dim

from ptqc.codegen.export._onnx_fold import Folded, fold
from ptqc.codegen.export._onnx_forms import Form
from ptqc.codegen.export._onnx_stored import decompositions
from ptqc.codegen.export._onnx_trace import Trace, language_model, plain_module, refuse_unknown_inputs
from ptqc.codegen.exporters import EXPORTERS, ExportedTensor, Fate, Written
from ptqc.errors import ExportError, first_line
from ptqc.qtensor import QuantTensor

__all__ = ["ONNX"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMS: tuple[Form, ...] = ("nbits", "standard", "float")
_OPSET = {"nbits": 21, "standard": 21, "float": 20}
"""Codes of 4 bits and blocks of DequantizeLinear are there from 21 on."""


@EXPORTERS.register("onnx")
@dataclass(frozen=True)
class ONNX:
    """Writes ONNX.

    quant: how linears are stored: "nbits" (ONNX Runtime's MatMulNBits), "standard" (DequantizeLinear) or "float".
    example_inputs: tensors to trace with, by position or by name. attention_mask: whether a language model takes one.
    cache: whether it takes and gives keys and values, to generate with. dtype: of floats ("float32", "float16",
    "bfloat16"); None keeps float16 and float32, and widens bfloat16, which ONNX Runtime does not compute on CPUs.
    external_data: weights in a second file, `<name>.data`; None: where one file cannot hold them (2 GB).
    """

    quant: Form = "nbits"
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None
    attention_mask: bool = True
    cache: bool = True
    dtype: str | None = None
    external_data: bool | None = None

    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self) -> None:
        if self.dtype not in (None, *_DTYPES):
            raise ExportError(f"onnx writes no {self.dtype!r} weights; dtype may be {', '.join(_DTYPES)}")
        if self.quant not in _FORMS:
            raise ExportError(f"onnx has no form {self.quant!r} of linears; quant may be {', '.join(_FORMS)}")

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """Nothing: every weight can be decoded."""
        return None

    def prepare(self, model: nn.Module, tokenizer: Any) -> Callable[[Path], Written]:
        """See `ptqc.codegen.exporters.Exporter`; a graph holds no tokenizer."""
        if self.example_inputs is None:
            refuse_unknown_inputs(model)
        plain, tensors = typed_copy(model, self.dtype)
        if self.example_inputs is None:
            trace = language_model(plain, takes_mask=self.attention_mask, has_cache=self.cache)
        else:
            trace = plain_module(plain, self.example_inputs)
        return lambda path: self._write(trace, path, tensors)

    def _write(self, trace: Trace, path: Path, tensors: Sequence[ExportedTensor]) -> Written:
        try:
            with _quiet(), torch.no_grad():
                program = self._program(trace)
        except Exception as error:  # what torch.export does not understand fails in any way
            raise ExportError(f"the model does not become an ONNX graph: {_told(error)}") from error
        folded = fold(program.model, self.quant)
        _name_axes(program.model, trace)
        with _quiet():
            program.save(path, external_data=self.external_data)
        try:
            onnx.checker.check_model(str(path), full_check=self.quant != "nbits")
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the graph is not valid ONNX: {first_line(error)}") from error
        return _written(tensors, folded, trace.prefix)

    def _program(self, trace: Trace) -> Any:
        program = torch.export.export(
            trace.module, (), dict(trace.inputs), dynamic_shapes=_dynamic(trace.axes), strict=False
        )
        return torch.onnx.export(
            program.run_decompositions(decompositions()),
            input_names=trace.input_names,
            output_names=trace.output_names or None,
            opset_version=_OPSET[self.quant],
            dynamo=True,
            verbose=False,
        )


def _told(error: BaseException) -> str:
    """What an error says, and what the one that caused it all says: torch.onnx names the step first."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(error) if cause is error else f"{first_line(error)} ({type(cause).__name__}: {first_line(cause)})"


def _dynamic(axes: Any) -> Any:
    """Every named axis as one of any size, in the same structure."""
    if isinstance(axes, Mapping):
        return {key: Dim.DYNAMIC if isinstance(key, int) else _dynamic(value) for key, value in axes.items()}
    return type(axes)(_dynamic(value) for value in axes)


def _name_axes(model: ir.Model, trace: Trace) -> None:
    for value, axes in zip(model.graph.inputs, trace.flat_axes, strict=True):
        assert value.shape is not None
        value.shape = ir.Shape([axes.get(axis, size) for axis, size in enumerate(value.shape)])


def _written(tensors: Sequence[ExportedTensor], folded: Mapping[str, Folded], prefix: str) -> Written:
    known = {name.removeprefix(prefix): what for name, what in folded.items()}
    made, said = [], list[str]()
    for tensor in tensors:
        what = known.get(tensor.name)
        if what is None:
            made.append(tensor)  # a float, or a stored weight that equals another one and is held once
            continue
        made.append(ExportedTensor(tensor.name, tensor.stored_name, what.stored_as, "lossless", what.nbytes))
        if what.note is not None:
            said.append(what.note)
    notes = [f"{said.count(note)} weights {note}" for note in dict.fromkeys(said)]
    return Written(tuple(made), tuple(notes))


def typed_copy(model: nn.Module, dtype: str | None) -> tuple[nn.Module, tuple[ExportedTensor, ...]]:
    """A copy of a model in evaluation mode with floats of one type, weights shared with it wherever they are of it.

    dtype: of the weights and saved buffers; None keeps it, bfloat16 excepted. Tied weights stay tied. Stored weights
    pretend to be of that type.
    """
    replaced: dict[int, Any] = {}
    tensors = []
    for name, weight in model.named_parameters():
        plain = _typed(weight.detach(), dtype)
        replaced[id(weight)] = nn.Parameter(plain, requires_grad=False)
        if isinstance(plain, QuantTensor):
            tensors.append(ExportedTensor(name, name, str(plain.spec), "lossless", 0))
            continue
        fate: Fate = "lossless" if torch.promote_types(plain.dtype, weight.dtype) == plain.dtype else "converted"
        stored_as = str(plain.dtype).removeprefix("torch.")
        tensors.append(ExportedTensor(name, name, stored_as, fate, plain.nbytes))
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        replaced[id(buffer)] = _typed(buffer, dtype) if name in saved else buffer
    return copy.deepcopy(model, replaced).eval(), tuple(tensors)


def _typed(tensor: Tensor, dtype: str | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    wanted = _DTYPES[dtype] if dtype else torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    if not isinstance(tensor, QuantTensor):
        return tensor.to(wanted)
    parts, spec = tensor.parts, tensor.spec
    if spec.scale.dtype == "e8m0":  # torch.onnx knows no such tensors
        parts, spec = parts | {"scale": parts["scale"].float()}, replace(spec, scale=replace(spec.scale, dtype="f32"))
    return tensor.with_parts(parts, spec=spec, dtype=wanted)


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
