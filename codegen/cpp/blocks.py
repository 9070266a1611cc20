"""How the inputs of a product are cut into blocks: the inputs that share an activation scale and an integer sum.

A block lies inside one group of the weight and has at most 128 inputs. Its length is a multiple of what the kernel
reads at a time; what the group does not fill is padded with zeros, in the prepared codes and in the activation alike.

    inputs    |  group 0          |  group 1          |  ...      k = groups * group (the last may be partial)
    blocks    | 0     | 1     |..| R    | R + 1 |..|              R blocks to a group
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LONGEST", "Blocks"]

LONGEST = 128
"""One scale for more than 128 inputs loses accuracy: their largest is too far from the others."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """k inputs in groups of `group`, each cut into `per_group` blocks of `length` inputs, padding included."""

    k: int
    group: int
    length: int
    per_group: int

    @staticmethod
    def cut(k: int, group: int | None, multiple: int) -> "Blocks":
        """The fewest blocks of at most 128 inputs, their length a multiple of `multiple`."""
        group = min(group or k, k)
        per_group = -(-group // LONGEST)
        return Blocks(k, group, -(-group // (per_group * multiple)) * multiple, per_group)

    @property
    def groups(self) -> int:
        """Groups along the inputs."""
        return -(-self.k // self.group)

    @property
    def count(self) -> int:
        """Blocks along the inputs."""
        return self.groups * self.per_group

    @property
    def padded(self) -> int:
        """Inputs with their padding."""
        return self.count * self.length

    def pad(self, values: Tensor) -> Tensor:
        """Spread values [rows, k] to [rows, padded]."""
        if self.padded == self.k:
            return values
        wide = values.new_zeros(values.shape[0], self.padded)
        wide[:, self._places()] = values
        return wide

    def unpad(self, wide: Tensor) -> Tensor:
        """Invert `pad`."""
        return wide if self.padded == self.k else wide[:, self._places()]

    def _places(self) -> Tensor:
        """The place of each input: only the end of a group is padded, since all of its blocks are equally long."""
        column = torch.arange(self.k)
        return column // self.group * (self.per_group * self.length) + column % self.group
