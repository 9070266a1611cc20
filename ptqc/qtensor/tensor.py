"""QuantTensor: a stored weight that stands in for an nn.Parameter.

A wrapper subclass of torch.Tensor: a spec and its parts. Matrix products, embedding, selection and views become
`ptqc::` operators on the parts (the table `RULES`); **anything else dequantizes and does what was asked**, so a
quantized model is right everywhere and fast where we recognise the operation. Only changing one in place is an error.

What is done around the stored matrix (`ptqc.surroundings`) is part of the weight: products with it run those steps,
and `dequantize` undoes them.

After compilation a weight may hold some of its parts only as a kernel reads them (`ptqc.held`); whoever asks for
`parts` gets them anew. The tensors themselves are under other names than the parts (`_slot`), and those of parts that
were given up are on the meta device, for the guards of graphs that were traced before.

Axes: the parts store [..., out, in] with groups along `in`. `is_transposed` says that the tensor itself looks like
[..., in, out] (the weight of a Conv1D, or a view by `.t()`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ptqc import ops, storage
from ptqc.errors import PtqcError
from ptqc.held import Held, order_called
from ptqc.identity import Mark
from ptqc.qtensor.rules import RULES
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings, apply, steps_undoing

__all__ = ["QuantTensor"]

_aten = torch.ops.aten
_TRIVIAL = Surroundings()


class _Part:
    """A part by its name, `weight.codes`; one that was given up is made anew."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, weight: "QuantTensor", owner: type) -> Tensor:
        slot: Tensor = getattr(weight, _slot(self.name))
        is_gone = weight.held is not None and self.name in weight.given_up  # after the slot, which is emptied then
        return weight.restored(self.name) if is_gone else slot


class QuantTensor(torch.Tensor):
    """A weight held as codes and scales.

    parts: see `ptqc.storage`. spec: how they are stored. stored_shape: [..., out, in]. dtype: what the weight
    pretends to be. is_transposed: whether the tensor's own shape has the last two axes swapped. surroundings, extras:
    what is done around it, and the vectors that takes.

    Example: `linear.weight = torch.nn.Parameter(quantized, requires_grad=False)`.
    """

    spec: WeightSpec
    stored_shape: tuple[int, ...]
    is_transposed: bool
    surroundings: Surroundings
    held: Held | None
    given_up: frozenset[str]
    stays_stored: bool
    mark: Mark
    _flat: tuple[list[str], tuple[Any, ...]] | None
    codes, scale, scale_outer, scale_offset, zero, zero_outer = (_Part() for _ in range(6))

    @staticmethod
    def __new__(
        cls,
        parts: Mapping[str, Tensor],
        spec: WeightSpec,
        stored_shape: Sequence[int],
        dtype: torch.dtype,
        is_transposed: bool = False,
        surroundings: Surroundings = _TRIVIAL,
        extras: Mapping[str, Tensor] | None = None,
        held: Held | None = None,
    ) -> "QuantTensor":
        shape, strides = list(stored_shape), _contiguous_strides(stored_shape)
        if is_transposed:
            shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
        device = held.prepared[0].device if held else parts["codes"].device
        self: QuantTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device, requires_grad=False
        )
        self.spec, self.stored_shape, self.is_transposed = spec, tuple(stored_shape), is_transposed
        self.held, self.given_up, self.stays_stored, self.mark = None, frozenset(), False, Mark()
        self._flat = None
        for name in storage.part_names(spec):
            if name in parts:
                setattr(self, _slot(name), parts[name])
        if held is not None:
            self._hold(held, [name for name in held.order.names if name not in parts])
        self.surroundings = surroundings
        for name in surroundings.extra_names:
            setattr(self, name, (extras or {})[name])
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def from_codes(
        logical: storage.Codes,
        spec: WeightSpec,
        dtype: torch.dtype,
        is_transposed: bool = False,
        surroundings: Surroundings = _TRIVIAL,
        extras: Mapping[str, Tensor] | None = None,
    ) -> "QuantTensor":
        """Pack codes [..., out, in] that a method chose for the matrix within the surroundings."""
        shape = (*logical.codes.shape[:-1], logical.codes.shape[-1] * spec.vector)
        extras = dict(extras or {})
        if logical.order is not None:
            given = extras.get("order")
            order = logical.order if given is None else torch.take_along_dim(given.long(), logical.order.long(), -1)
            surroundings, extras["order"] = replace(surroundings, order=True), order.to(torch.int32)
        return QuantTensor(storage.encode(logical, spec), spec, shape, dtype, is_transposed, surroundings, extras)

    # ---------------------------------------------------------------- reading

    @property
    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by name, in the order in which ops take them; those given up are made anew."""
        return {name: getattr(self, name) for name in storage.part_names(self.spec)}

    @property
    def extras(self) -> dict[str, Tensor]:
        """The vectors of its surroundings by name."""
        return {name: getattr(self, name) for name in self.surroundings.extra_names}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored: parts, then extras."""
        return self.parts | self.extras

    @property
    def stored_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of everything that is stored."""
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in (self.slots | self.extras).items()}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of all parts and extras."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.slots | self.extras).values())

    def dequantize(self) -> Tensor:
        """The numbers it stands for, as a plain tensor of its own shape and dtype, whatever happens to inputs."""
        steps = steps_undoing(self.surroundings, self.extras)
        dtype = torch.float32 if steps else self.dtype
        stored: Tensor = ops.dequantize(list(self.parts.values()), str(self.spec), list(self.stored_shape), dtype)
        weight = apply(steps, stored).to(self.dtype)
        return weight.mT if self.is_transposed else weight

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        turned = ", is_transposed=True" if self.is_transposed else ""
        around = "" if self.surroundings.is_trivial else f", surroundings={self.surroundings.to_json()}"
        what = f"{self.spec}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}"
        return f"QuantTensor({what}{turned}{around})"

    # ---------------------------------------------------------------- holding parts as a kernel reads them

    @property
    def slots(self) -> dict[str, Tensor]:
        """The parts as far as they are there: those given up are on the meta device."""
        return {name: getattr(self, _slot(name)) for name in storage.part_names(self.spec)}

    @property
    def memory(self) -> tuple[Tensor, int]:
        """The tensor that holds the codes, and the row of it with which they begin: equal for views of one weight."""
        if self.held is None or "codes" not in self.given_up:
            return self.slots["codes"], 0
        return self.held.prepared[0], self.held.order.first

    def restored(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """A part that was given up, or `rows` of its rows from `first` on."""
        assert self.held is not None
        part: Tensor = ops.restore(list(self.held.prepared), self.held.order.called, name, first, rows)
        return part

    def as_stored(self) -> "QuantTensor":
        """For readers who come back many times: itself, or a weight over parts made anew where some were given up."""
        return self.with_parts(self.parts) if self.given_up else self

    def give_up(self, held: Held) -> None:
        """Hold the parts that `held` names only as a kernel reads them from now on."""
        self._hold(held, held.order.names)

    def _hold(self, held: Held, given_up: Sequence[str]) -> None:
        for index, tensor in enumerate(held.prepared):
            setattr(self, f"_prepared_{index}", tensor)
        self.held, self.given_up, self._flat = held, frozenset(given_up), None
        for name in given_up:
            shape, dtype = held.order.part_layout[name]
            setattr(self, _slot(name), torch.empty(shape, dtype=dtype, device="meta"))

    def take_back(self) -> None:
        """Hold all parts as they are stored, besides what kernels read, for good."""
        for name, part in self.parts.items():
            setattr(self, _slot(name), part)
        self.given_up, self.stays_stored = frozenset(), True

    def forget_kernels(self) -> None:
        """Hold all parts as they are stored and be another weight to every compiled graph: the values will change."""
        if self.held is not None:
            self.take_back()
            for index in range(len(self.held.prepared)):
                delattr(self, f"_prepared_{index}")
        self.held, self.mark, self.stays_stored, self._flat = None, Mark(), False, None

    # ---------------------------------------------------------------- being a tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        if self._flat is None:  # guards ask on every call
            self._flat = self._flattened()
        return self._flat

    def _flattened(self) -> tuple[list[str], tuple[Any, ...]]:
        meta = (self.spec, self.stored_shape, self.dtype, self.is_transposed, self.surroundings)
        names = storage.part_names(self.spec)
        if self.held is None:
            return [*map(_slot, names), *self.surroundings.extra_names], (*meta, None)
        order = self.held.order
        names = [name for name in names if name not in order.names]
        names += [f"prepared_{index}" for index in range(len(self.held.prepared))]
        return [*map(_slot, names), *self.surroundings.extra_names], (*meta, order.called)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: tuple[Any, ...], outer_size: object, outer_stride: object
    ) -> "QuantTensor":
        *known, order = meta
        parts = {name[1:]: part for name, part in inner.items() if name.startswith("_")}
        prepared = tuple(part for name, part in parts.items() if name.startswith("prepared_"))
        held = None if order is None else Held(order_called(order), prepared)
        return QuantTensor(parts, *known, extras=inner, held=held)

    def _stable_hash_for_caching(self) -> str:
        _, meta = self.__tensor_flatten__()
        return str(meta)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as (parts, meta): `torch.save` works, and `torch.load` with weights_only=True reads it back."""
        around = () if self.surroundings.is_trivial else (self.surroundings.to_json(), self.extras)
        return _rebuild, (self.parts, str(self.spec), self.stored_shape, self.dtype, self.is_transposed, *around)

    def with_parts(self, parts: Mapping[str, Tensor], **changes: Any) -> "QuantTensor":
        """The same weight over other parts; `changes` replace spec, stored_shape, dtype, is_transposed, surroundings
        or extras."""
        meta = {"spec": self.spec, "stored_shape": self.stored_shape, "dtype": self.dtype}
        around = {"is_transposed": self.is_transposed, "surroundings": self.surroundings, "extras": self.extras}
        return QuantTensor(parts, **(meta | around | changes))

    def alias(self, is_transposed: bool | None = None) -> "QuantTensor":
        """A view of the weight, turned or not, that holds what it holds."""
        alias, held = _aten.alias.default, self.held
        if held is not None:
            held = Held(held.order, tuple(map(alias, held.prepared)))
        return self.with_parts(
            {name: alias(part) for name, part in self.slots.items() if name not in self.given_up},
            is_transposed=self.is_transposed if is_transposed is None else is_transposed,
            extras={name: alias(extra) for name, extra in self.extras.items()},
            held=held,
        )

    def each(self, function: Callable[[Tensor], Tensor], **changes: Any) -> "QuantTensor":
        """The weight over what a function makes of every part and extra; `changes` as for `with_parts`."""
        extras = {name: function(extra) for name, extra in self.extras.items()}
        return self.with_parts({name: function(part) for name, part in self.parts.items()}, extras=extras, **changes)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func) or RULES.get(str(func))
        if func.is_view and torch.is_inference_mode_enabled():
            # A view of a normal tensor must be a normal tensor, also in inference mode.
            with torch.inference_mode(any(isinstance(a, QuantTensor) and a.is_inference() for a in args)):
                result = NotImplemented if rule is None else rule(*args, **kwargs)
        else:
            result = NotImplemented if rule is None else rule(*args, **kwargs)
        if result is NotImplemented:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        _refuse_mutation(func, args, kwargs)
        return func(*tree_map_only(QuantTensor, _plain, args), **tree_map_only(QuantTensor, _plain, kwargs))


def _rebuild(
    parts: dict[str, Tensor],
    spec: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    is_transposed: bool,
    around: dict[str, Any] | None = None,
    extras: dict[str, Tensor] | None = None,
) -> QuantTensor:
    surroundings = Surroundings.from_json(around or {})
    return QuantTensor(parts, WeightSpec.parse(spec), shape, dtype, is_transposed, surroundings, extras)


_rebuild.__module__ = "ptqc.qtensor"  # files name it so
torch.serialization.add_safe_globals([_rebuild])


def _slot(part: str) -> str:
    """The attribute that holds a part."""
    return f"_{part}"


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides[-len(shape) :]


def _plain(weight: QuantTensor) -> Tensor:
    return weight.dequantize()


def _refuse_mutation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.is_write and isinstance(value, QuantTensor):
            break
    else:
        if not isinstance(kwargs.get("out"), QuantTensor):
            return
    raise PtqcError(
        f"{func} would change a quantized weight in place; call .dequantize() and change that, then quantize it again"
    )
