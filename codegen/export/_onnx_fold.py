"""From nodes on stored parts (`_onnx_stored`) to nodes that ONNX runtimes execute, in place.

1. Linear, where an operator has the weight's form   -> MatMulNBits, MatMulBnb4, or DequantizeLinear and MatMul
2. Linear on a Quantize, int8 with one scale a row   -> MatMulInteger, scaled
3. any other Linear, and Decode                      -> codes that operators decode (`_onnx_decode`), and MatMul; the
                                                        weight in floats where those were asked for, or nothing else is
4. Quantize with any other reader                    -> Round and Clip
5. Rotate                                            -> one MatMul for each factor of the rotation

The parts disappear; what takes their place is made once per weight.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from torch import Tensor

from ptqc import hadamard, storage
from ptqc.act_spec import ActSpec
from ptqc.codegen.export._onnx_decode import coded
from ptqc.codegen.export._onnx_forms import Blockwise, Form, Native, blockwise, native
from ptqc.codegen.export._onnx_stored import DOMAIN
from ptqc.spec import WeightSpec

__all__ = ["Folded", "fold"]

_PART = re.compile(r"(?:^|\.)parametrizations\.(\w+)\.original\d+$")
_LARGEST, _FLOOR = 127.0, 1e-30


@dataclass(frozen=True)
class Folded:
    """What became of a stored weight. stored_as: type in the file. note: what it is instead of an operator's form, and
    why."""

    stored_as: str
    nbytes: int
    note: str | None = None


def fold(model: ir.Model, form: Form) -> dict[str, Folded]:
    """Replace every node on stored parts. Returns what became of each weight, by its name in the traced module."""
    work = _Fold(model, form)
    rules = {"Linear": work.linear, "Decode": work.decode, "Rotate": work.rotate}
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        if node.op_type in rules:
            rules[node.op_type](node)
    for node in [node for node in model.graph if node.domain == DOMAIN]:
        work.quantize(node)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    return work.folded


@dataclass
class _Fold:
    model: ir.Model
    form: Form
    folded: dict[str, Folded] = field(default_factory=dict)
    _made: dict[tuple[str, str], Any] = field(default_factory=dict)
    _rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    # ---------------------------------------------------------------- products

    def linear(self, node: ir.Node) -> None:
        """Rules 1 to 3."""
        x, *parts = node.inputs
        spec = WeightSpec.parse(_text(node, "spec"))
        assert x is not None and parts[0] is not None and parts[0].shape is not None and x.shape is not None
        shape = (int(parts[0].shape[0]), int(x.shape[-1]))  # type: ignore[arg-type]
        tape = ir.tape.Tape()
        producer = x.producer()
        is_quantized = producer is not None and producer.domain == DOMAIN
        weight = blockwise(_tensors(parts, spec), spec, shape) if is_quantized else ""
        if producer is not None and isinstance(weight, Blockwise) and _is_integer(weight):
            made = self._integer(tape, node, producer, weight)
        else:
            made = self._product(tape, node, x, spec, shape)
        self._replace(node, tape, made)

    def _product(self, tape: ir.tape.Tape, node: ir.Node, x: ir.Value, spec: WeightSpec, shape: Any) -> ir.Value:
        _, *parts = node.inputs
        stored = native(self.form, _tensors(parts, spec), spec, shape, x.dtype == ir.DataType.FLOAT)
        if isinstance(stored, Native):
            return self._packed(tape, node, x, stored)
        matrix = self._once(
            (self._name(node), f"{x.dtype} transposed"),
            lambda: self._numbers(tape, node, spec, shape, x.dtype, transposed=True, reason=stored),
        )
        return tape.op("MatMul", [x, matrix])

    def _packed(self, tape: ir.tape.Tape, node: ir.Node, x: ir.Value, stored: Native) -> ir.Value:
        name = self._name(node)
        values = self._once((name, stored.op), lambda: self._initializers(name, stored.arrays))
        self.folded[name] = Folded(stored.label, sum(value.const_value.nbytes for value in values if value))
        codes, *rest = values
        inputs = [codes, *(value for value in (self._as(tape, value, x.dtype) for value in rest) if value is not None)]
        if stored.domain:
            return tape.op(stored.op, [x, *inputs], stored.attributes, domain=stored.domain, version=1)
        return tape.op("MatMul", [x, tape.op(stored.op, inputs, stored.attributes)])

    def _integer(self, tape: ir.tape.Tape, node: ir.Node, quantize: ir.Node, weight: Blockwise) -> ir.Value:
        name = self._name(node)
        codes, scale = self._once((name, "MatMulInteger"), lambda: self._int8(name, weight))
        self.folded[name] = Folded("MatMulInteger 8", codes.const_value.nbytes + scale.const_value.nbytes)
        steps, row = self._steps(quantize)
        total = tape.op("Cast", [tape.op("MatMulInteger", [tape.op("Cast", [steps], {"to": 3}), codes])], {"to": 1})
        made = tape.op("Mul", [tape.op("Mul", [total, row]), scale])
        assert node.outputs[0].dtype is not None
        return made if node.outputs[0].dtype == ir.DataType.FLOAT else _cast(tape, made, node.outputs[0].dtype)

    def _int8(self, name: str, weight: Blockwise) -> list[ir.Value]:
        codes = (weight.codes.short() - weight.zero.flatten()[0].short()).to(torch.int8).mT.contiguous()
        made = self._initializers(name, [codes.numpy(), weight.scale.float().flatten().numpy()])
        return [value for value in made if value is not None]

    # ---------------------------------------------------------------- numbers

    def decode(self, node: ir.Node) -> None:
        """Rule 3."""
        shape = node.attributes["shape"].as_ints()
        spec, dtype, tape = WeightSpec.parse(_text(node, "spec")), node.outputs[0].dtype, ir.tape.Tape()
        made = self._once(
            (self._name(node), str(dtype)),
            lambda: self._numbers(tape, node, spec, shape, dtype, transposed=False, reason="it is no linear's"),
        )
        self._replace(node, tape, made)

    def _numbers(
        self, tape: ir.tape.Tape, node: ir.Node, spec: WeightSpec, shape: Sequence[int], dtype: Any, *,
        transposed: bool, reason: str,
    ) -> ir.Value:  # fmt: skip
        name = self._name(node)
        parts = _tensors([value for value in node.inputs if value is not None and value.const_value is not None], spec)
        found = coded(parts, spec, shape) if self.form != "float" else None
        if found is None or isinstance(found, str):
            return self._floats(name, storage.decode(parts, spec, shape, torch.float32), dtype, transposed, found)
        held: list[ir.Value] = []

        def constant(kind: str, value: Any) -> ir.Value:
            made = self._constant(kind if kind.startswith("ptqc.") else f"{name}.{kind}", value)
            held.extend([] if kind.startswith("ptqc.") else [made])
            return made

        made = found.decoded(tape, constant)
        nbytes = sum(value.const_value.nbytes for value in held if value.const_value is not None)
        note = f"are codes that other operators of the graph decode: {reason}"
        self.folded[name] = Folded(f"codes {spec.codebook or spec.bits}", nbytes, note)
        if transposed:
            made = tape.op("Transpose", [made], {"perm": [1, 0]})
        return made if dtype == ir.DataType.FLOAT else _cast(tape, made, dtype)

    def _floats(self, name: str, numbers: Tensor, dtype: Any, transposed: bool, reason: str | None) -> ir.Value:
        array = (numbers.mT if transposed else numbers).numpy().astype(dtype.numpy())
        (matrix,) = self._initializers(name, [array])
        assert matrix is not None and matrix.const_value is not None
        note = None if reason is None else f"are decoded to floats: {reason}"
        self.folded[name] = Folded(str(dtype.numpy()), matrix.const_value.nbytes, note)
        return matrix

    # ---------------------------------------------------------------- inputs

    def quantize(self, node: ir.Node) -> None:
        """Rule 4."""
        if not list(node.outputs[0].uses()):
            return
        steps, row = self._steps(node)
        tape = ir.tape.Tape()
        made = tape.op("Mul", [steps, row])
        dtype = node.outputs[0].dtype
        self._replace(node, tape, made if dtype == ir.DataType.FLOAT or dtype is None else _cast(tape, made, dtype))

    def _steps(self, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        """Rounded inputs in float32, and what a step is worth; made once for all readers."""
        output = node.outputs[0]
        if output not in self._rows:
            tape = ir.tape.Tape()
            x = node.inputs[0]
            assert x is not None
            wide = x if x.dtype == ir.DataType.FLOAT else tape.op("Cast", [x], {"to": 1})
            row = node.inputs[1] if len(node.inputs) > 1 else self._step(tape, wide, ActSpec.parse(_text(node, "act")))
            rounded = tape.op("Round", [tape.op("Div", [wide, row])])
            limits = [self._constant("ptqc.lowest", -_LARGEST), self._constant("ptqc.largest", _LARGEST)]
            assert row is not None
            self._rows[output] = tape.op("Clip", [rounded, *limits]), row
            self.model.graph.insert_before(node, tape.nodes)
        return self._rows[output]

    def _step(self, tape: ir.tape.Tape, x: ir.Value, act: ActSpec) -> ir.Value:
        size = tape.op("Abs", [x])
        if act.scale == "token":
            axes = self._constant("ptqc.last_axis", np.array([-1]))
            largest = tape.op("ReduceMax", [size, axes], {"keepdims": 1})
        else:
            largest = tape.op("ReduceMax", [size], {"keepdims": 0})
        bounded = tape.op("Max", [largest, self._constant("ptqc.floor", _FLOOR)])
        return tape.op("Div", [bounded, self._constant("ptqc.largest", _LARGEST)])

    def rotate(self, node: ir.Node) -> None:
        """Rule 5."""
        x, tape = node.inputs[0], ir.tape.Tape()
        assert x is not None and x.dtype is not None
        factors = [factor.astype(np.float32) for factor in hadamard.factors(_text(node, "name"))]
        rotated = x if x.dtype == ir.DataType.FLOAT else _cast(tape, x, ir.DataType.FLOAT)
        right = math.prod(map(len, factors))
        for factor in factors:
            right //= len(factor)
            left = self._rotation(factor.T if node.attributes["is_back"].as_int() else factor)
            shape = self._constant(f"ptqc.shape.{len(factor)}.{right}", np.array([-1, len(factor), right]))
            rotated = tape.op("MatMul", [left, tape.op("Reshape", [rotated, shape])])
        rotated = tape.op("Reshape", [rotated, tape.op("Shape", [x])])
        self._replace(node, tape, rotated if x.dtype == ir.DataType.FLOAT else _cast(tape, rotated, x.dtype))

    def _rotation(self, factor: npt.NDArray[np.float32]) -> ir.Value:
        return self._constant(f"ptqc.rotation.{len(factor)}.{hashlib.sha256(factor.tobytes()).hexdigest()[:8]}", factor)

    # ---------------------------------------------------------------- the graph

    def _replace(self, node: ir.Node, tape: ir.tape.Tape, made: ir.Value) -> None:
        old = node.outputs[0]
        if made.dtype is None and old.dtype is not None:
            made.dtype = old.dtype
        made.shape = made.shape or old.shape
        self.model.graph.insert_before(node, tape.nodes)
        for domain, version in tape.used_opsets:
            if domain:
                self.model.graph.opset_imports.setdefault(domain, version or 1)
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)

    def _name(self, node: ir.Node) -> str:
        part = next(value for value in reversed(node.inputs) if value is not None)
        return _PART.sub(lambda found: f".{found[1]}", part.name or "").lstrip(".")

    def _once(self, key: tuple[str, str], make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _initializers(self, name: str, arrays: Sequence[Any]) -> list[ir.Value | None]:
        kinds = ("codes", "scale", "zero") if len(arrays) > 1 else ("decoded",)
        return [
            None if array is None else self._constant(f"{name}.{kind}", array)
            for kind, array in zip(kinds, arrays, strict=False)
        ]

    def _constant(self, name: str, value: Any) -> ir.Value:
        initializers = self.model.graph.initializers
        if name.startswith("ptqc.") and name in initializers:
            return initializers[name]
        free = name
        while free in initializers:
            free += "_"
        array = np.asarray(value, dtype=np.float32) if isinstance(value, float) else np.ascontiguousarray(value)
        made = ir.Value(name=free, const_value=ir.tensor(array, name=free))
        made.dtype, made.shape = made.const_value.dtype, ir.Shape(array.shape)  # type: ignore[union-attr]
        self.model.graph.register_initializer(made)
        return made

    def _as(self, tape: ir.tape.Tape, value: ir.Value | None, dtype: Any) -> ir.Value | None:
        """A scale or zero in the type of the activation; packed zeros stay as they are."""
        if value is None or value.dtype in (dtype, ir.DataType.UINT8, ir.DataType.UINT4):
            return value
        return _cast(tape, value, dtype)


def _cast(tape: ir.tape.Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    made = tape.op("Cast", [value], {"to": int(dtype)})
    made.dtype = dtype
    return made


def _text(node: ir.Node, name: str) -> str:
    return node.attributes[name].as_string()


def _tensors(parts: Sequence[ir.Value | None], spec: WeightSpec) -> dict[str, Tensor]:
    arrays = [part.const_value for part in parts if part is not None]
    return {name: _tensor(value) for name, value in zip(storage.part_names(spec), arrays, strict=True)}


def _tensor(value: Any) -> Tensor:
    raw = getattr(value, "raw", None)
    return raw.detach().cpu() if isinstance(raw, Tensor) else torch.from_numpy(np.array(value.numpy()))


def _is_integer(weight: Blockwise | str) -> bool:
    if isinstance(weight, str) or weight.bits != 8 or weight.scale.shape[1] != 1 or not weight.is_integer:
        return False
    return bool((weight.zero == 128).all())
