"""Values between pieces: what every batch has alive there, in memory, or on disk where that would be too much.

On disk a batch is one safetensors file in a temporary folder. Values keep their dtype and the order of their strides,
so that a piece computes the same bits whichever place they were in.
"""

import json
import shutil
import tempfile
from collections.abc import Container, Mapping
from pathlib import Path
from types import TracebackType

import safetensors
import safetensors.torch
from torch import Tensor

__all__ = ["BUDGET_BYTES", "Activations"]

BUDGET_BYTES = 1 << 31
"""Values beyond this go to disk."""


class Activations:
    """The live values of every batch, by name. A context manager: files are removed at its end.

    on_disk: True for disk from the beginning; False for memory whatever the size; None for memory up to `budget` bytes.
    folder: where the temporary folder is made.
    """

    def __init__(
        self,
        batches: int,
        *,
        on_disk: bool | None = None,
        budget: int = BUDGET_BYTES,
        folder: Path | None = None,
    ) -> None:
        self._held: list[dict[str, Tensor]] = [{} for _ in range(batches)]
        self._sizes = [0] * batches
        self._budget = None if on_disk is False else budget
        self._parent = folder
        self._folder: Path | None = None
        if on_disk:
            self._begin_folder()

    @property
    def is_on_disk(self) -> bool:
        """Whether values are written to files."""
        return self._folder is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the values of all batches, wherever they are."""
        return sum(self._sizes)

    def values(self, batch: int) -> dict[str, Tensor]:
        """The live values of a batch."""
        if self._folder is None:
            return dict(self._held[batch])
        path = self._path(batch)
        return _read(path) if path.exists() else {}

    def update(self, batch: int, made: Mapping[str, Tensor], keep: Container[str]) -> None:
        """Take in values that a piece gave for a batch, and drop all but those in `keep`."""
        values = {name: value for name, value in (self.values(batch) | dict(made)).items() if name in keep}
        self._sizes[batch] = sum(value.numel() * value.element_size() for value in values.values())
        if self._folder is not None:
            _write(self._path(batch), values)
            return
        self._held[batch] = {name: _own(value) for name, value in values.items()}
        if self._budget is not None and self.nbytes > self._budget:
            self._spill()

    def _spill(self) -> None:
        self._begin_folder()
        for batch, values in enumerate(self._held):
            if values:
                _write(self._path(batch), values)
            values.clear()

    def _begin_folder(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ptqc-activations-", dir=self._parent))

    def _path(self, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{batch:06d}.safetensors"

    def __enter__(self) -> "Activations":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._held.clear()


def _own(value: Tensor) -> Tensor:
    """The value without the rest of the memory that it is a part of."""
    is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if is_part else value


def _order(value: Tensor) -> list[int]:
    """The axes from the widest stride to the narrowest."""
    return sorted(range(value.ndim), key=lambda axis: -value.stride()[axis])


def _write(path: Path, values: Mapping[str, Tensor]) -> None:
    orders = {name: _order(value) for name, value in values.items()}
    packed = {name: value.permute(orders[name]).contiguous() for name, value in values.items()}
    data = safetensors.torch.save(_apart(packed), {"orders": json.dumps(orders)})
    path.write_bytes(data)


def _apart(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values that share memory as copies: safetensors refuses them otherwise."""
    seen: set[int] = set()
    found = {}
    for name, value in values.items():
        memory = value.untyped_storage().data_ptr()
        found[name] = value.clone() if memory in seen and value.numel() else value
        seen.add(memory)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        orders = json.loads(file.metadata()["orders"])
        names = list(file.keys())
        found = {name: file.get_tensor(name).clone() for name in names}
    return {name: value.permute(_inverse(orders[name])) for name, value in found.items()}


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
