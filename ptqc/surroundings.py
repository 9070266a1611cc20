"""Surroundings: what is done at run time around a stored matrix.

A stored matrix S [*lead, out, in] stands for the weight W of the model through

    y = W x = O^T . S . A( (R . (x * input_scale))[order] )        W = O^T . S . P . R . diag(input_scale)

    input_scale   factors of the inputs that could not be folded elsewhere (AWQ, SmoothQuant)
    R, O          orthogonal: random signs, then a Hadamard rotation (`ptqc.hadamard`)
    order         column j of S belongs to input order[j] behind R (act-order of GPTQ); P is that permutation
    A             quantization of the input (`ptqc.activations`)

The vectors this takes are the *extras* of a weight. Everything is spelled as `Step`s on ordinary and `ptqc::`
operators, which eager code runs and lowering writes into the graph.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqc import ops
from ptqc.act_spec import ActSpec
from ptqc.errors import SpecError
from ptqc.hadamard import rotate

__all__ = [
    "EXTRAS", "Step", "Surroundings", "apply", "check_extras", "steps_after", "steps_before", "steps_undoing",
    "stored_matrix", "stored_statistics",
]  # fmt: skip

EXTRAS = ("input_scale", "order", "input_signs", "output_signs", "act_scale")
"""Names of all extras there are, in the order in which a weight holds them."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands around a stored matrix; the vectors themselves are the extras of the weight.

    input_scale, order: whether there is such a vector. input_rotation, output_rotation: names of constructions of
    `ptqc.hadamard`. act: what happens to the input.
    """

    input_scale: bool = False
    order: bool = False
    input_rotation: str | None = None
    output_rotation: str | None = None
    act: ActSpec = dataclasses.field(default_factory=ActSpec)
    extra_names: tuple[str, ...] = dataclasses.field(init=False, repr=False, compare=False)
    """Names of the extras, in the order of `EXTRAS`; kept, since every view of a weight asks for them."""

    def __post_init__(self) -> None:
        has = {
            "input_scale": self.input_scale,
            "order": self.order,
            "input_signs": self.input_rotation is not None,
            "output_signs": self.output_rotation is not None,
            "act_scale": self.act.is_static,
        }
        object.__setattr__(self, "extra_names", tuple(name for name in EXTRAS if has[name]))

    @property
    def is_trivial(self) -> bool:
        """True if the stored matrix is the weight, and its input is taken as it comes."""
        return self == Surroundings()

    @property
    def keeps_weight(self) -> bool:
        """True if the stored matrix is the weight, whatever happens to the input."""
        return dataclasses.replace(self, act=ActSpec()).is_trivial

    def layout(self, stored_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every extra of a weight of `stored_shape` [*lead, out, in].

        Raises: SpecError if a rotation is of another size.
        """
        *lead, out_features, in_features = stored_shape
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "input_scale": ((in_features,), torch.float32),
            "order": ((*lead, in_features), torch.int32),
            "input_signs": ((in_features,), torch.int8),
            "output_signs": ((out_features,), torch.int8),
            "act_scale": ((), torch.float32),
        }
        _check_rotation(self.input_rotation, in_features)
        _check_rotation(self.output_rotation, out_features)
        return {name: layout[name] for name in self.extra_names}

    def to_json(self) -> dict[str, Any]:
        """The JSON form: the fields that are not the default, `act` by its name.

        >>> Surroundings(order=True, act=ActSpec(dtype="int8")).to_json()
        {'order': True, 'act': 'int8-token'}
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        default = Surroundings()
        changed = {name: value for name, value in fields.items() if value != getattr(default, name)}
        return {name: str(value) if name == "act" else value for name, value in changed.items()}

    @staticmethod
    def from_json(form: object) -> "Surroundings":
        """Read the JSON form. Raises: SpecError for anything that `to_json` does not write."""
        if not isinstance(form, Mapping):
            raise SpecError(f"the surroundings of a weight are a table, not {form!r}")
        unknown = [name for name in form if name not in _FORMS]
        if unknown:
            raise SpecError(f"nothing around a weight is called {unknown[0]!r}; known: {', '.join(_FORMS)}")
        wrong = [name for name, value in form.items() if not isinstance(value, _FORMS[name])]
        if wrong:
            raise SpecError(f"{wrong[0]} around a weight cannot be {form[wrong[0]]!r}")
        return Surroundings(**(dict(form) | {"act": ActSpec.parse(form.get("act", "float"))}))


_FORMS: dict[str, type] = {
    "input_scale": bool,
    "order": bool,
    "input_rotation": str,
    "output_rotation": str,
    "act": str,
}


_NAME = re.compile(r"had[0-9rx]{1,100}")


def _check_rotation(name: str | None, channels: int) -> None:
    """Refuse a rotation of another size by its name alone: it may come from a hostile file, which claims any shape."""
    if name is None:
        return
    orders = [int(order) for order in re.findall(r"\d+", name)] if _NAME.fullmatch(name) else []
    if not orders or math.prod(orders) != channels:
        raise SpecError(f"{name!r} is no rotation of {channels} channels; `ptqc.hadamard` spells those there are")


def check_extras(surroundings: Surroundings, extras: Mapping[str, Tensor], stored_shape: Sequence[int]) -> None:
    """Hold the extras of a weight of `stored_shape` [*lead, out, in] against what stands around it.

    Raises: SpecError for one that is missing or superfluous, or has the wrong shape, type or values.
    """
    layout = surroundings.layout(stored_shape)
    if extras.keys() != layout.keys():
        wanted, found = ", ".join(layout) or "none", ", ".join(extras) or "none"
        raise SpecError(f"the surroundings {surroundings.to_json()} need the extras {wanted}; found are {found}")
    for name, extra in extras.items():
        shape, dtype = layout[name]
        if tuple(extra.shape) != shape or extra.dtype != dtype:
            raise SpecError(f"{name} must be {dtype} {list(shape)}, not {extra.dtype} {list(extra.shape)}")
        is_right, rule = _VALUES[name]
        if not extra.is_meta and not is_right(extra):
            raise SpecError(f"{name} must hold {rule}")
    rotations = {"input_signs": surroundings.input_rotation, "output_signs": surroundings.output_rotation}
    for signs, rotation in rotations.items():
        if rotation is not None and not extras[signs].is_meta:
            rotate(extras[signs].float(), rotation)  # refuses what names no rotation


def _is_permutation(order: Tensor) -> bool:
    counted = torch.arange(order.shape[-1], device=order.device, dtype=order.dtype)
    return bool((order.sort(-1).values == counted).all())


def _is_factor(scale: Tensor) -> bool:
    return bool((torch.isfinite(scale) & (scale != 0)).all())


def _is_sign(signs: Tensor) -> bool:
    return bool((signs.abs() == 1).all())


_VALUES: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    "input_scale": (_is_factor, "finite factors other than zero"),
    "order": (_is_permutation, "every input once"),
    "input_signs": (_is_sign, "signs, 1 and -1"),
    "output_signs": (_is_sign, "signs, 1 and -1"),
    "act_scale": (lambda scale: bool(torch.isfinite(scale) & (scale > 0)), "a positive number"),
}


# -------------------------------------------------------------------- steps


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: function(value, *arguments)."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...] = ()


def apply(steps: Iterable[Step], value: Tensor) -> Tensor:
    """Run the steps on a value, one after the other."""
    for step in steps:
        value = step.function(value, *step.arguments)
    return value


def steps_before(surroundings: Surroundings, extras: Mapping[str, Tensor], dtype: torch.dtype) -> list[Step]:
    """What the input x [..., in] of `dtype` (of a stack: [*lead, tokens, in]) goes through before the product."""
    return [
        *_scaled(surroundings, extras, dtype),
        *_turned(surroundings, extras),
        *_quantized(surroundings, extras),
    ]


def steps_after(surroundings: Surroundings, extras: Mapping[str, Tensor]) -> list[Step]:
    """What the product [..., out] goes through, before a bias is added."""
    if surroundings.output_rotation is None:
        return []
    return [Step(ops.hadamard_back, (surroundings.output_rotation,)), Step(torch.mul, (extras["output_signs"],))]


def steps_undoing(surroundings: Surroundings, extras: Mapping[str, Tensor]) -> list[Step]:
    """What turns the stored matrix [*lead, out, in], in float32, into the weight."""
    steps = []
    if surroundings.order:
        steps.append(_reordered(torch.argsort(extras["order"], dim=-1)))
    if surroundings.input_rotation is not None:
        steps.append(Step(ops.hadamard_back, (surroundings.input_rotation,)))
        steps.append(Step(torch.mul, (extras["input_signs"],)))
    steps += _scaled(surroundings, extras, torch.float32)
    after = steps_after(surroundings, extras)
    return [*steps, _TRANSPOSE, *after, _TRANSPOSE] if after else steps


_TRANSPOSE = Step(torch.transpose, (-1, -2))


def _scaled(surroundings: Surroundings, extras: Mapping[str, Tensor], dtype: torch.dtype) -> list[Step]:
    return [Step(torch.mul, (extras["input_scale"].to(dtype),))] if surroundings.input_scale else []


def _turned(surroundings: Surroundings, extras: Mapping[str, Tensor]) -> list[Step]:
    """Rotation, then order, of rows along the inputs."""
    steps = []
    if surroundings.input_rotation is not None:
        steps.append(Step(torch.mul, (extras["input_signs"],)))
        steps.append(Step(ops.hadamard, (surroundings.input_rotation,)))
    if surroundings.order:
        steps.append(_reordered(extras["order"]))
    return steps


def _reordered(order: Tensor) -> Step:
    if order.ndim == 1:
        return Step(torch.index_select, (-1, order))
    return Step(torch.take_along_dim, (order.long().unsqueeze(-2), -1))


def _quantized(surroundings: Surroundings, extras: Mapping[str, Tensor]) -> list[Step]:
    if surroundings.act.dtype is None:
        return []
    return [Step(ops.fake_quantize, (str(surroundings.act), extras.get("act_scale")))]


# -------------------------------------------------------------------- storing


def stored_matrix(weight: Tensor, surroundings: Surroundings, extras: Mapping[str, Tensor]) -> Tensor:
    """The matrix to store for a weight: S = O . W . diag(1 / input_scale) . R^T . P^T.

    weight: [*lead, out, in] of any float dtype. Returns the same shape, float32 (the weight itself if nothing changes
    it).
    """
    if surroundings.keeps_weight:
        return weight
    matrix = weight.float()
    if surroundings.input_scale:
        matrix = matrix / extras["input_scale"]
    matrix = apply(_turned(surroundings, extras), matrix)
    if surroundings.output_rotation is not None:
        matrix = ops.hadamard(matrix.mT * extras["output_signs"], surroundings.output_rotation).mT
    return matrix


_BY_CHANNEL: dict[str, Callable[[Tensor], Tensor]] = {
    "absmax": lambda rows: rows.abs().amax(-2),
    "mean_abs": lambda rows: rows.abs().mean(-2),
    "mean_square": lambda rows: rows.square().mean(-2),
    "percentile": lambda rows: rows.abs().quantile(0.999, dim=-2),
}
"""Statistics of single channels, which a rotation mixes: how they follow from a sample of rows."""


def stored_statistics(
    statistics: Mapping[str, Tensor], surroundings: Surroundings, extras: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The statistics of what the stored matrix is multiplied with, from those of the input of the weight.

    Both [*lead, ...] under the names of the contract of methods. Magnitudes of channels do not survive a rotation; they
    are taken from the sample "rows" then, and left out if there is none. Quantization of the input is not seen.
    """
    if surroundings.keeps_weight:
        return dict(statistics)
    steps = [*_scaled(surroundings, extras, torch.float32), *_turned(surroundings, extras)]
    moved = dict(statistics)
    if "rows" in moved:
        moved["rows"] = apply(steps, moved["rows"])
    if "mean" in moved:
        moved["mean"] = _vectors(steps, moved["mean"])
    if "hessian" in moved:
        moved["hessian"] = apply(steps, apply(steps, moved["hessian"]).mT.contiguous()).mT.contiguous()
    for name in moved.keys() & _BY_CHANNEL.keys():
        if surroundings.input_rotation is None:
            vectors = moved[name].sqrt() if name == "mean_square" else moved[name]
            vectors = _vectors(steps, vectors).abs()
            moved[name] = vectors.square() if name == "mean_square" else vectors
        elif "rows" in moved:
            moved[name] = _BY_CHANNEL[name](moved["rows"])
        else:
            del moved[name]
    return moved


def _vectors(steps: Sequence[Step], vectors: Tensor) -> Tensor:
    return apply(steps, vectors.unsqueeze(-2)).squeeze(-2)
