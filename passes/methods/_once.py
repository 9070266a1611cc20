"""What is made of a Hessian, made once: weights that read one value are quantized one after the other.

Query, key and value share their statistics, the same tensor, and so an order of columns and a Cholesky factor, which
cost as much as the rounding. Only the last is kept, and only as long as its Hessian lives.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["once_for"]

T = TypeVar("T")
_last: list[tuple[weakref.ref[Tensor], object, Any]] = []


def once_for(hessian: Tensor, key: object, make: Callable[[], T]) -> T:
    """What `make` returns; what it returned before, if it was last asked of this very tensor with an equal key."""
    if _last:
        held, asked, made = _last[0]
        if held() is hessian and asked == key:
            found: T = made
            return found
    _last.clear()
    fresh = make()
    _last[:] = [(weakref.ref(hessian, lambda _: _last.clear()), key, fresh)]
    return fresh
