"""What a transform is: it changes a model without changing its function, so that quantizing hurts less.

A transform is one file in `passes/transforms/`: a frozen dataclass whose fields are its options. It sees matrices and
statistics, never a graph: what may be scaled is found and proved by `ptqc.passes.groups`, and carried out by the
engine. It overrides the steps that it has; the others leave everything as it is. The steps come in this order:

1. `scale`: a scale for each channel of a scale group (SmoothQuant, AWQ);
2. `around`: what is done at run time around a stored matrix (Hadamard rotations);
3. `clip`: another float weight to choose codes for (AWQ's clipping), unless the method searches ranges itself
   (`finds_ranges`);
4. `correct`: a correction of the bias once the codes are chosen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.errors import PtqcError
from ptqc.registry import Registry
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings

__all__ = ["TRANSFORMS", "Member", "Transform", "surround"]


@dataclass(frozen=True, eq=False)
class Member:
    """One weight as a transform sees it.

    weight: [*lead, out, in] float32, the current values. statistics: of its input x, see `ptqc.statistics`. In the step
    `scale` "hessian" is diagonal where the method feeds errors back to later columns (it has `column_importance`): what
    an error costs in the end, no longer what it costs at first.
    spec, act: how it will be stored, and what will be done to its input. channel: for a weight in a scale group, the
    channel of each column, [in] int64, -1 for columns that are left alone.
    """

    name: str
    weight: Tensor
    statistics: Mapping[str, Tensor]
    spec: WeightSpec
    act: ActSpec = field(default_factory=ActSpec)
    channel: Tensor | None = None


class Transform:
    """One change of a model that keeps its function. A subclass is a frozen dataclass; its fields are its options."""

    default_method: ClassVar[str] = "rtn"
    """The method that follows where the user names only the transform."""
    default_options: ClassVar[Mapping[str, object]] = {}
    """Options of that method."""
    default_group: ClassVar[int | None] = None
    """Group of its spec; None: the method's own."""
    default_activation: ClassVar[ActSpec | None] = None
    """What is done to the inputs then; None: what the method has."""

    @property
    def needs(self) -> frozenset[str]:
        """Statistics of the input that it reads; may depend on its options."""
        return frozenset()

    @property
    def is_data_free(self) -> bool:
        """Whether a weight alone is enough for it: no statistics, no scale groups, no bias."""
        return not self.needs and not self.has_scale and type(self).correct is Transform.correct

    @property
    def has_scale(self) -> bool:
        """Whether it has the step `scale`, and so wants scale groups."""
        return type(self).scale is not Transform.scale

    def refuses(self, members: Sequence[Member]) -> str | None:
        """Why `scale` has nothing to do for any such group, told to the user once; None where it may have."""
        return None

    def scale(self, members: Sequence[Member], channels: int) -> Tensor | None:
        """The scale s [channels] float32, positive: columns of the members are multiplied by it, their input divided.

        members: every weight that reads the value. None leaves the group alone.
        """
        return None

    def around(self, member: Member) -> tuple[Surroundings, dict[str, Tensor]]:
        """What is to be done at run time around the stored matrix, and the tensors that takes."""
        return Surroundings(), {}

    def clip(self, member: Member) -> Tensor:
        """The weight to choose codes for, [*lead, out, in] float32."""
        return member.weight

    def correct(self, member: Member, stored: Tensor) -> Tensor | None:
        """What to add to the bias, [out] float32. stored: [out, in], the numbers that the codes stand for."""
        return None


def surround(transforms: Iterable[Transform], member: Member) -> tuple[Surroundings, dict[str, Tensor]]:
    """What transforms do at run time around a weight, and the tensors that takes.

    Raises: PtqcError if two of them rotate it.
    """
    turning = [transform for transform in transforms if type(transform).around is not Transform.around]
    if len(turning) > 1:
        raise PtqcError(f'"{member.name}": two transforms rotate it; keep one of them')
    return turning[0].around(member) if turning else (Surroundings(), {})


TRANSFORMS: Registry[type[Transform]] = Registry("transform", "ptqc.passes.transforms")
