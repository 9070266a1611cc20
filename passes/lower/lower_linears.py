"""Pass lower-linears: replace products with stored weights by sites (`ptqc.passes.lower.site`).

1. linear(x, W, b), W stored [out, in]           -> product(x, parts, b)
2. addmm(b, x, W) and matmul(x, W), W [in, out]  -> product(x, parts, b)    (Conv1D)
3. matmul(x, t(W)), W stored [out, in]           -> product(x, parts)
4. bmm(x, transpose(W)) of an expert stack       -> ptqc::bmm(x, parts)
5. any other use of W                            -> ptqc::dequantize(parts), once, before its first such use
6. What is done around a stored matrix (`ptqc.surroundings`) becomes nodes around the product, and around the
   dequantized matrix in rule 5. Products that do the same to the same input share these nodes, unless something writes
   that input in place.
The pass fires for every weight in `context.quantized` and for nothing else.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ptqc import ops
from ptqc.passes.lower.in_place import written
from ptqc.passes.lower.site import product_node
from ptqc.pipeline import Context, Pass, Site
from ptqc.qtensor import QuantTensor
from ptqc.requests import KernelRequest
from ptqc.surroundings import Step, steps_after, steps_before, steps_undoing
from ptqc.views import function_name, is_matrix_transpose

__all__ = ["LowerLinears"]

_PRODUCTS = frozenset({"matmul", "mm", "__matmul__"})


@dataclass(frozen=True)
class LowerLinears(Pass):
    """names: qualified name of each get_attr node, for the record of what was chosen."""

    name: ClassVar[str] = "lower-linears"

    names: dict[fx.Node, str]

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Rewrite every use. Returns how many uses were rewritten."""
        surroundings = _Surroundings(module, written(module.graph))
        uses = sum(
            _Weight(module, context, surroundings, node, self.names[node], stored).lower()
            for node, stored in context.quantized.items()
        )
        for node in context.quantized:
            module.graph.erase_node(node)
            delattr(module, str(node.target))
        context.sites = {node: context.sites[node] for node in sorted(context.sites)}
        return uses


@dataclass
class _Surroundings:
    """Steps around products, written into the graph once for every value that they are done to."""

    module: fx.GraphModule
    written: frozenset[fx.Node]
    made: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    tensors: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def before(self, steps: Sequence[Step], x: fx.Node, product: fx.Node) -> fx.Node:
        """The input of a product behind the steps, right behind x, where every product can reach it."""
        if x in self.written:
            with self.module.graph.inserting_before(product):
                return self.steps(steps, x)
        for step in steps:
            arguments = [self._name(given) if isinstance(given, Tensor) else given for given in step.arguments]
            key = (x, step.function, *arguments)
            if key not in self.made:
                with self.module.graph.inserting_before(_behind(x)):
                    self.made[key] = self.steps([step], x)
            x = self.made[key]
        return x

    def steps(self, steps: Sequence[Step], value: fx.Node) -> fx.Node:
        """Write steps into the graph where it is being written."""
        for step in steps:
            arguments = [
                self.module.graph.get_attr(self._name(given)) if isinstance(given, Tensor) else given
                for given in step.arguments
            ]
            seen = value.meta.get("example_value")
            value = self.module.graph.call_function(step.function, (value, *arguments))
            value.meta["example_value"] = seen
        return value

    def _name(self, tensor: Tensor) -> str:
        """The attribute that holds a tensor with these values."""
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest = hashlib.sha256(values.numpy().tobytes()).digest()
        key = (tensor.shape, tensor.dtype, tensor.device, digest)
        if key not in self.tensors:
            self.tensors[key] = f"around_{len(self.tensors)}"
            self.module.register_buffer(self.tensors[key], tensor)
        return self.tensors[key]


def _behind(node: fx.Node) -> fx.Node:
    """The first node before which everything may read `node`; inputs stay together at the top."""
    behind = node.next
    while node.op == "placeholder" and behind.op in ("placeholder", "get_attr"):
        behind = behind.next
    return behind


@dataclass
class _Weight:
    """One stored weight on its way into the graph."""

    module: fx.GraphModule
    context: Context
    surroundings: _Surroundings
    node: fx.Node
    name: str
    stored: QuantTensor
    attributes: dict[Tensor, str] = field(default_factory=dict)

    def lower(self) -> int:
        """Rewrite all uses of the weight; return how many there were."""
        users = list(self.node.users)
        rest = [user for user in users if not self._lower_use(user)]
        if rest:
            self._dequantize(rest)
        return len(users)

    def _lower_use(self, user: fx.Node) -> bool:
        call = _as_linear(user, self.node, self.stored.is_transposed)
        if call is not None and self.stored.ndim == 2 and _is_floating(call.x, self.stored.dtype):
            self._make_site(user, call)
            return True
        if not is_matrix_transpose(user):
            return False
        lowered = [self._lower_transposed(product, user) for product in list(user.users)]
        if all(lowered):
            self.module.graph.erase_node(user)
        return all(lowered)

    def _lower_transposed(self, product: fx.Node, view: fx.Node) -> bool:
        call = _as_linear(product, view, not self.stored.is_transposed)
        if call is None or not _is_floating(call.x, self.stored.dtype):
            return False
        if self.stored.ndim == 2:
            self._make_site(product, call)
            return True
        if self.stored.ndim == 3 and function_name(product) == "bmm":
            x = self._before(call.x, product)
            with self.module.graph.inserting_before(product):
                made = self._call(ops.bmm, (x, self._stored_parts(), str(self.stored.spec)))
                self._replace(product, self._after(made, None))
            return True
        return False

    def _make_site(self, user: fx.Node, call: "_Linear") -> None:
        shape = self.stored.stored_shape
        is_rotated = self.stored.surroundings.output_rotation is not None
        bias = None if is_rotated else call.bias
        request = KernelRequest(
            self.stored.spec,
            shape[0],
            shape[1],
            self.stored.dtype,
            self.stored.device.type,
            epilogue=() if bias is None else ("bias",),
            needs_grad=torch.is_grad_enabled() and any(map(_takes_part, (call.x, bias))),
            exact=self.context.exact,
        )
        x = self._before(call.x, user)
        with self.module.graph.inserting_before(user):
            operands = [] if bias is None else [bias]
            made = product_node(self.module.graph, request, x, [self._parts()], operands, request.spec)
            made.meta = dict(user.meta)
            self.context.sites[made] = Site((self.name,), (self.stored,))
            self._replace(user, self._after(made, call.bias if is_rotated else None))

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> fx.Node:
        return self.module.graph.call_function(function, arguments)

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        self.module.graph.erase_node(old)

    def _before(self, x: fx.Node, product: fx.Node) -> fx.Node:
        steps = steps_before(self.stored.surroundings, self.stored.extras, self.stored.dtype)
        return self.surroundings.before(steps, x, product)

    def _after(self, product: fx.Node, bias: fx.Node | None) -> fx.Node:
        product = self.surroundings.steps(steps_after(self.stored.surroundings, self.stored.extras), product)
        return product if bias is None else self._call(torch.add, (product, bias))

    def _dequantize(self, users: Sequence[fx.Node]) -> None:
        with self.module.graph.inserting_before(min(users)):
            steps = steps_undoing(self.stored.surroundings, self.stored.extras)
            dtype = torch.float32 if steps else self.stored.dtype
            arguments = (self._stored_parts(), str(self.stored.spec), list(self.stored.stored_shape), dtype)
            plain = self.surroundings.steps(steps, self._call(ops.dequantize, arguments))
            if dtype != self.stored.dtype:
                plain = self._call(torch.ops.aten.to.dtype, (plain, self.stored.dtype))
            if self.stored.is_transposed:
                plain = self._call(torch.transpose, (plain, -1, -2))
        plain.meta = {key: value for key, value in self.node.meta.items() if key != "tensor_dict"}
        for user in users:
            user.replace_input_with(self.node, plain)

    def _parts(self) -> list[fx.Node]:
        """Nodes for the parts: attributes, or what makes a part anew that only a kernel's order of it holds."""
        held, slots = self.stored.held, self.stored.slots
        return [
            self._call(ops.restore, ([*map(self._attribute, held.prepared)], held.order.called, name))
            if held is not None and name in self.stored.given_up
            else self._attribute(slot)
            for name, slot in slots.items()
        ]

    def _stored_parts(self) -> list[fx.Node]:
        """Nodes for the parts where the graph goes on reading them as they are stored."""
        self.stored.take_back()
        return self._parts()

    def _attribute(self, tensor: Tensor) -> fx.Node:
        """The attribute that holds a tensor of the weight, registered once."""
        name = self.attributes.setdefault(tensor, f"{self.node.target}_parts_{len(self.attributes)}")
        if not hasattr(self.module, name):
            self.module.register_buffer(name, tensor)
        return self.module.graph.get_attr(name)


@dataclass(frozen=True)
class _Linear:
    """x @ W.T + bias, W being [..., out, in]."""

    x: fx.Node
    bias: fx.Node | None


def _as_linear(node: fx.Node, weight: fx.Node, is_in_out: bool) -> _Linear | None:
    """Read a node as a product with `weight`, which is [..., in, out] if `is_in_out`, else [..., out, in]."""
    name = function_name(node)
    arguments: dict[int | str, Any] = dict(enumerate(node.args)) | dict(node.kwargs)
    if name == "linear" and not is_in_out:
        x, operand = arguments.get(0, arguments.get("input")), arguments.get(1, arguments.get("weight"))
        bias = arguments.get(2, arguments.get("bias"))
    elif name == "addmm" and is_in_out and len(node.args) == 3 and not node.kwargs and _ndim(node.args[0]) == 1:
        bias, x, operand = node.args
    elif name in (_PRODUCTS | {"bmm"}) and is_in_out and len(node.args) == 2:
        (x, operand), bias = node.args, None
    else:
        return None
    if operand is not weight or not isinstance(x, fx.Node) or x is weight or bias is weight or _ndim(x) < 2:
        return None
    return _Linear(x, bias)


def _ndim(node: Any) -> int:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else 0


def _takes_part(node: fx.Node | None) -> bool:
    """True if a derivative towards a value may be asked for."""
    value = None if node is None else node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad


def _is_floating(x: fx.Node, dtype: torch.dtype) -> bool:
    value = x.meta.get("example_value")
    return isinstance(value, Tensor) and value.dtype == dtype
