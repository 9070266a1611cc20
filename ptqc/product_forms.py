"""Product forms: what the arguments of every operator that multiplies two matrices mean.

All of them are a times b along an axis k, a [.., m, k] or [k], b [.., k, n] or, where `k_of_b` is -1, [n, k] or [k].
The names are those of torch functions, methods and ATen operators alike (`ptqc.views.function_name`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["PRODUCTS", "ProductForm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductForm:
    """One operator. names: of its arguments in order; a, b, added, offsets: the positions of the factors, of what is
    added to the product, and of where the rows of each matrix of b end.

    k_of_b: the contracted axis of b if it has two or more. weight_in: the factors in which models have weights.
    is_aten: whether it is left in functional ATen graphs. sums_batch: whether the products of a batch are added up.
    """

    names: tuple[str, ...]
    a: int = 0
    b: int = 1
    added: int | None = None
    offsets: int | None = None
    k_of_b: int = -2
    weight_in: str = "ab"
    is_aten: bool = True
    sums_batch: bool = False

    def argument(self, node: fx.Node, position: int | None) -> Any:
        """The argument of a call at a position, by its place or its name; None if it is not given."""
        if position is None:
            return None
        return node.args[position] if position < len(node.args) else node.kwargs.get(self.names[position])


PRODUCTS: Mapping[str, ProductForm] = {
    "linear": ProductForm(names=("input", "weight", "bias"), added=2, k_of_b=-1, weight_in="b"),
    "matmul": ProductForm(names=("input", "other"), is_aten=False),
    "__matmul__": ProductForm(names=("self", "other"), is_aten=False),
    "__rmatmul__": ProductForm(names=("self", "other"), a=1, b=0, is_aten=False),
    "mm": ProductForm(names=("input", "mat2")),
    "bmm": ProductForm(names=("input", "mat2")),
    "mv": ProductForm(names=("input", "vec"), k_of_b=-1),
    "dot": ProductForm(names=("input", "tensor"), k_of_b=-1, weight_in=""),
    "addmm": ProductForm(names=("input", "mat1", "mat2"), a=1, b=2, added=0),
    "baddbmm": ProductForm(names=("input", "batch1", "batch2"), a=1, b=2, added=0),
    "addmv": ProductForm(names=("input", "mat", "vec"), a=1, b=2, added=0, k_of_b=-1),
    "addbmm": ProductForm(names=("input", "batch1", "batch2"), a=1, b=2, added=0, sums_batch=True),
    "grouped_mm": ProductForm(names=("mat_a", "mat_b", "offs"), offsets=2, weight_in="b"),
    "_grouped_mm": ProductForm(names=("self", "mat2", "offs"), offsets=2, weight_in="b"),
    "grouped_mm_fallback": ProductForm(names=("input", "weight", "offs"), offsets=2, weight_in="b"),
}
"""Operator -> its form."""
