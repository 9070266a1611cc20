"""Pass lower-experts: products of rows that go to experts of a stack W [experts, out, in], by the kernel of one expert.

1. grouped_mm(x, transpose(W), offsets), rows sorted by expert         -> kernel(x, parts of W, offsets)
2. bmm(W[ids], x.unsqueeze(2)), an expert for each row                 -> kernel(x, parts of W, ids)
3. both with a stack that looks like [experts, in, out]: grouped_mm(x, W, offsets), bmm(x.unsqueeze(1), W[ids])
Experts without rows are not read, and nothing is dequantized. It does not fire on GPUs, where the host would have to
wait for the offsets, in training, with anything around the stored matrices, and where the kernel's layout does not hold
experts one below the other; lower-linears then dequantizes the stack.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from ptqc.held import Layout
from ptqc.passes.lower.prepared import give_up_parts, prepared_parts
from ptqc.pipeline import ChosenKernel, Context, Pass, Site
from ptqc.product_forms import PRODUCTS
from ptqc.program import value_of
from ptqc.qtensor import QuantTensor
from ptqc.requests import ExpertCall, KernelRequest
from ptqc.views import function_name, is_matrix_transpose

__all__ = ["LowerExperts"]

_BATCHED = frozenset({"bmm", "matmul", "__matmul__"})


@dataclass(frozen=True)
class LowerExperts(Pass):
    """names: qualified name of each get_attr node, for the record of what was chosen."""

    name: ClassVar[str] = "lower-experts"

    names: dict[fx.Node, str]

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many products were rewritten."""
        return sum(
            _Stack(module, context, node, self.names[node], stored).lower()
            for node, stored in context.quantized.items()
            if stored.ndim == 3
        )


@dataclass(frozen=True)
class _Product:
    """A product to be replaced. x: of rows [rows, in] once `axis` is squeezed out; at: offsets of experts, or an expert
    for each row."""

    node: fx.Node
    x: fx.Node
    at: fx.Node
    is_sorted: bool
    axis: int | None = None


@dataclass
class _Stack:
    module: fx.GraphModule
    context: Context
    node: fx.Node
    name: str
    stored: QuantTensor
    attributes: list[str] = field(default_factory=list)

    def lower(self) -> int:
        """Rewrite its products with rows; returns how many there were."""
        products = [product for product in self._products() if self._is_served(product)]
        if not products or not self.stored.surroundings.is_trivial:
            return 0
        experts, n, k = self.stored.stored_shape
        request = KernelRequest(self.stored.spec, n, k, self.stored.dtype, self.stored.device.type,
                                exact=self.context.exact)  # fmt: skip
        kernel = self.context.kernel(request)
        layout = kernel.layout.stacked(experts)
        if kernel.experts is None or layout is None:
            return 0
        site = Site((self.name,), (self.stored,))
        prepared = prepared_parts(layout, site.weights)
        known = {tensor: name for name, tensor in self.module.named_buffers()}  # one tensor must not have two names
        for index, part in enumerate(prepared):
            name = known.setdefault(part, f"{self.node.name}_experts_{index}")
            self.module.register_buffer(name, part)
            self.attributes.append(name)
        for product in products:
            self._replace(product, kernel.experts)
            self.context.chosen.append((site, ChosenKernel(site.names, request, kernel)))
        self._let_go(layout, site, prepared)
        return len(products)

    def _let_go(self, layout: Layout, site: Site, prepared: list[Tensor]) -> None:
        for user in list(self.node.users):
            if not user.users and (is_matrix_transpose(user) or _is_choice(user, self.node)):
                self.module.graph.erase_node(user)
        if not self.node.users and not self.context.keeps_stored:
            self.context.unused += give_up_parts(layout, site.weights, prepared)

    def _products(self) -> Iterator[_Product]:
        for user in self.node.users:
            if self.stored.is_transposed:
                yield from _grouped(user, self.node)
            elif is_matrix_transpose(user):
                for reader in user.users:
                    yield from _grouped(reader, user)
            if _is_choice(user, self.node):
                for reader in user.users:
                    yield from self._batched(reader, user)

    def _batched(self, node: fx.Node, chosen: fx.Node) -> Iterator[_Product]:
        """Rules 2 and 3: one row for each chosen matrix."""
        if function_name(node) not in _BATCHED or len(node.args) != 2 or node.kwargs:
            return
        first, second = node.args
        x, matrices, axis = (first, second, 1) if self.stored.is_transposed else (second, first, 2)
        ids = chosen.args[1]
        if matrices is chosen and isinstance(x, fx.Node) and isinstance(ids, fx.Node):
            value = value_of(x)
            if isinstance(value, Tensor) and value.ndim == 3 and value.shape[axis] == 1:
                yield _Product(node, x, ids, False, axis)

    def _is_served(self, product: _Product) -> bool:
        x, at = value_of(product.x), value_of(product.at)
        if not isinstance(x, Tensor) or not isinstance(at, Tensor) or at.ndim != 1 or at.dtype == torch.bool:
            return False
        if x.dtype != self.stored.dtype or x.device.type != "cpu" or at.device.type != "cpu":
            return False
        return not (torch.is_grad_enabled() and x.requires_grad)

    def _replace(self, product: _Product, call: ExpertCall) -> None:
        graph = self.module.graph
        experts, width, _ = self.stored.stored_shape
        with graph.inserting_before(product.node):
            parts = [graph.get_attr(name) for name in self.attributes]
            x = product.x
            if product.axis is not None:
                x = graph.call_function(torch.squeeze, (x, product.axis))
            made = graph.call_function(call, (x, parts, product.at, experts, product.is_sorted, width))
            if product.axis is not None:
                made = graph.call_function(torch.unsqueeze, (made, product.axis))
        made.meta = dict(product.node.meta)
        product.node.replace_all_uses_with(made)
        graph.erase_node(product.node)


def _grouped(node: fx.Node, weight: fx.Node) -> Iterator[_Product]:
    """Rule 1: rows of x that the offsets part."""
    form = PRODUCTS.get(function_name(node))
    if form is None or form.offsets is None:
        return
    x, offsets = form.argument(node, form.a), form.argument(node, form.offsets)
    known = {form.names[position] for position in (form.a, form.b, form.offsets)}
    is_plain = len(node.args) <= 3 and all(value is None for name, value in node.kwargs.items() if name not in known)
    if form.argument(node, form.b) is weight and is_plain and isinstance(x, fx.Node) and isinstance(offsets, fx.Node):
        value = value_of(x)
        if x is not weight and isinstance(value, Tensor) and value.ndim == 2:
            yield _Product(node, x, offsets, True)


def _is_choice(node: fx.Node, weight: fx.Node) -> bool:
    """True for W[ids] with a vector of ids."""
    if node.target is not operator.getitem or node.args[0] is not weight or not isinstance(node.args[1], fx.Node):
        return False
    ids = value_of(node.args[1])
    return isinstance(ids, Tensor) and ids.ndim == 1 and not ids.dtype.is_floating_point and ids.dtype != torch.bool
