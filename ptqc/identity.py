"""Tables that know weights by identity, weakly.

Keys are parameters, or the marks of quantized weights: a module that moves its parameters to another device or type
exchanges the contents of quantized ones and refuses to where a weak reference to the parameter itself exists. A mark
goes with the contents, so what is known of a weight is forgotten where it becomes another.
"""

from typing import Any, Generic, TypeVar

from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Mark", "WeightTable", "mark_of"]

V = TypeVar("V")


class Mark:
    """What stands for the contents of a quantized weight in tables; every weight has one of its own."""

    __slots__ = ("__weakref__",)


def mark_of(weight: Any) -> Any:
    """The mark of a quantized weight, any other object itself."""
    return getattr(weight, "mark", weight)


class WeightTable(Generic[V]):
    """A dictionary with weights as keys that ends with them."""

    def __init__(self) -> None:
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __contains__(self, weight: object) -> bool:
        return mark_of(weight) in self._values

    def __getitem__(self, weight: object) -> V:
        found: V = self._values[mark_of(weight)]
        return found

    def __setitem__(self, weight: object, value: V) -> None:
        self._values[mark_of(weight)] = value

    def get(self, weight: object, default: V) -> V:
        """The value of a weight, or the default."""
        found: V = self._values.get(mark_of(weight), default)
        return found

    def setdefault(self, weight: object, default: V) -> V:
        """The value of a weight, which is the default if it had none."""
        found: V = self._values.setdefault(mark_of(weight), default)
        return found
