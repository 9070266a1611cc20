"""What the text of a kernel runs: `Linear.layout` and `Linear.run` around the kernels that the text defines.

Programs that share a tile meet in a workspace and at counters, which are zero between launches. There is one for every
stream, and one for all CUDA graphs, made when a weight is prepared: memory that is taken while a graph is captured
belongs to that graph. Two graphs with split products must therefore not run at the same time.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.activations import quantize_input
from ptqc.codegen.gpu.eight_bit import eight_bit_form, eight_bit_modes, summed_group
from ptqc.codegen.gpu.forms import WeightForm, form_of
from ptqc.codegen.gpu.inputs import needs_entry
from ptqc.codegen.gpu.order import ByteOrder, WordOrder
from ptqc.codegen.gpu.parts import padded
from ptqc.codegen.gpu.tiles import Tile, device_facts, is_dense_better, pieces_of, split_of, tile_for
from ptqc.fusions import apply_fusions, narrows
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec

__all__ = ["EightBitLinear", "Linear", "is_interpreted"]

_WORKSPACE = 2 * 8 * 1024 * 1024
"""Float32 numbers in a workspace: two programs on each of up to 512 processors, tiles of 128 x 128."""
_COUNTERS = 4096

_workspaces: dict[tuple[torch.device, int | str], tuple[Tensor, Tensor]] = {}


def is_interpreted() -> bool:
    """True if Triton runs kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Linear:
    """A weight-only kernel. kernels: the Triton functions of the text, by name."""

    spec: str
    n: int
    k: int
    dtype: torch.dtype
    kernels: Mapping[str, Any]
    prologue: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()

    @cached_property
    def request(self) -> KernelRequest:
        """The request that the text was made for."""
        return KernelRequest(
            WeightSpec.parse(self.spec), self.n, self.k, self.dtype, "cuda", ActSpec(), self.prologue, self.epilogue
        )

    @cached_property
    def form(self) -> WeightForm:
        """The form of the weight."""
        form = form_of(self.request.spec, self.k, self.dtype)
        assert isinstance(form, WeightForm)
        return form

    @cached_property
    def has_gate(self) -> bool:
        """True if the two halves of the outputs take turns."""
        return any(map(narrows, self.epilogue))

    @cached_property
    def layout(self) -> WordOrder:
        """How the kernels hold the weight."""
        return WordOrder(self.form, reserve_workspace, f"{self.spec} {self.dtype}", self.n, self.k, self.has_gate)

    def run(self, x: Tensor, parts: Sequence[Tensor], operands: Sequence[Tensor]) -> Tensor:
        """The result for x [rows, in]."""
        out = x.new_empty((x.shape[0], self.request.width))
        if len(x) > 0:
            before, given = self.request.operands_before, [operand.contiguous() for operand in operands]
            with on_device(x.device):
                self._launch(x.contiguous(), parts, given[:before], given[before:], out)
        return out

    def _launch(
        self, x: Tensor, parts: Sequence[Tensor], before: list[Tensor], behind: list[Tensor], out: Tensor
    ) -> None:
        """before, behind: the operands of the prologue and of the epilogue."""
        if needs_entry(self.request):
            x = enter(self.kernels["enter"], x, before)
        weight_bytes = parts[0].numel() * 2
        if is_dense_better(len(x), self.n, self.k, weight_bytes, device_facts(x.device)):
            self._dense(x, parts, behind, out)
        else:
            self._fused(x, parts, behind, out)

    def _fused(self, x: Tensor, parts: Sequence[Tensor], operands: Sequence[Tensor], out: Tensor) -> None:
        outputs, blocks = padded(self.n), -(-self.k // self.form.layout.block)
        tile = tile_for(len(x), self.form.decoding, device_facts(x.device).capability)
        pointers, sizes = [x, *parts, *operands, out], (self.n, self.k, outputs)
        launch_product(self.kernels["matmul"], tile, pointers, sizes, blocks, **pieces_of(tile, self.form.layout))

    def _dense(self, x: Tensor, parts: Sequence[Tensor], operands: Sequence[Tensor], out: Tensor) -> None:
        outputs, blocks, modes = padded(self.n), -(-self.k // self.form.layout.block), device_modes(x.device)
        weight = x.new_empty((self.k, outputs))
        self.kernels["unpack"][outputs // 128, blocks](*parts, weight, self.n, self.k, outputs, BN=128, **modes)
        y = x @ weight
        grid = (-(-len(x) // 32) * (outputs // 64),)
        self.kernels["finish"][grid](y, *operands, out, len(x), self.n, outputs, BM=32, BN=64)


@dataclass(frozen=True)
class EightBitLinear(Linear):
    """A kernel for inputs that are quantized at run time."""

    act: str = "int8-token"

    @cached_property
    def request(self) -> KernelRequest:
        """The request that the text was made for."""
        return replace(super().request, act=ActSpec.parse(self.act))

    @cached_property
    def form(self) -> WeightForm:
        """The form of the weight."""
        form = eight_bit_form(self.request)
        assert isinstance(form, WeightForm)
        return form

    @cached_property
    def layout(self) -> ByteOrder:
        """How the kernels hold the weight."""
        name = f"{self.spec} {self.form.words_type}"
        return ByteOrder(self.form, reserve_workspace, name, self.n, self.k, self.has_gate)

    def _launch(
        self, x: Tensor, parts: Sequence[Tensor], before: list[Tensor], behind: list[Tensor], out: Tensor
    ) -> None:
        act = self.request.act
        if act.scale == "tensor" and not act.is_static:
            prologue = apply_fusions(self.prologue, x.float(), before).to(x.dtype)
            before = [*before, quantize_input(prologue, act)[1].view(1)]
        capability = device_facts(x.device).capability
        tile = tile_for(len(x), self.form.decoding, capability)
        pointers, sizes = [*self._enter(x, before), *parts, *behind, out], (self.n, self.k, padded(self.n))
        modes = eight_bit_modes(device_modes(x.device)["PTX"], capability)
        launch_product(self.kernels["matmul"], tile, pointers, sizes, -(-self.k // self.form.layout.block), **modes)

    def _enter(self, x: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
        """Codes of the input, their scales, and their sums where they are asked for."""
        codes = torch.empty_like(x, dtype=torch.int8 if self.request.act.dtype == "int8" else torch.float8_e4m3fn)
        results, summed = [codes, x.new_empty(len(x), dtype=torch.float32)], summed_group(self.request, self.form)
        groups = 1 if summed is None else -(-self.k // summed)
        if summed is not None:
            results.append(x.new_empty((len(x), groups), dtype=torch.float32))
        width = 1 << ((summed or self.k) - 1).bit_length()
        rows = 1 << (groups - 1).bit_length()
        self.kernels["enter"][(len(x),)](
            x, *operands, *results, self.k, GROUPS=rows, WIDTH=width, num_warps=entry_warps(width * rows)
        )
        return results


def launch_product(
    kernel: Any, tile: Tile, pointers: Sequence[Tensor], sizes: tuple[int, int, int], blocks: int, **constants: int
) -> None:
    """Launch a product over `blocks` blocks.

    pointers: from the input to the result. sizes: n, k, and outputs with padding.
    """
    x, device = pointers[0], device_facts(pointers[0].device)
    tiles = sizes[2] // tile.outputs * -(-len(x) // tile.rows)
    split, chunk = split_of(tiles, blocks, device, tile.programs)
    partial, counters = workspace(x.device)
    if tiles * split * tile.rows * tile.outputs > partial.numel() or tiles > counters.numel():
        split, chunk = 1, blocks
    modes = device_modes(x.device)
    registers = {"maxnreg": tile.registers} if modes["PTX"] and tile.registers else {}
    kernel[tiles, split](
        *pointers, partial, counters, len(x), *sizes, blocks, chunk, split, BM=tile.rows, BN=tile.outputs,
        IS_SPLIT=split > 1, num_warps=tile.warps, num_stages=tile.stages, **constants, **registers, **modes,
    )  # fmt: skip


def enter(kernel: Any, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """The input after the prologue, in its own type."""
    v = torch.empty_like(x)
    width = 1 << (x.shape[1] - 1).bit_length()
    kernel[(len(x),)](x, *operands, v, x.shape[1], GROUPS=1, WIDTH=width, num_warps=entry_warps(width))
    return v


def entry_warps(width: int) -> int:
    """Warps for a row of so many numbers."""
    return min(16, max(1, width // 512))


def device_modes(device: torch.device) -> dict[str, bool]:
    """PTX: the kernel may use assembler. EMULATED: it runs in the interpreter, which multiplies no bfloat16."""
    return {"PTX": device.type == "cuda" and torch.version.hip is None, "EMULATED": device.type != "cuda"}


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def reserve_workspace(device: torch.device) -> None:
    """Make the workspaces of the current stream and of graphs, if they are not there."""
    workspace(device)
    if device.type == "cuda":
        _workspace_of(device, "graph")


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for partial sums, and counters that are zero, for the current stream."""
    if device.type != "cuda":
        return _workspace_of(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _workspace_of(device, "graph")
    return _workspace_of(device, int(torch.cuda.current_stream(device).cuda_stream))


def _workspace_of(device: torch.device, key: int | str) -> tuple[Tensor, Tensor]:
    if (device, key) not in _workspaces:
        size = _WORKSPACE if device.type == "cuda" else _WORKSPACE // 16
        partial = torch.empty(size, device=device)
        _workspaces[device, key] = partial, torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return _workspaces[device, key]
