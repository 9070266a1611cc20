"""Attention of few queries on GPUs, compiled, counted, held against gates; `benchmarks.static_gates` runs all."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks._gates import programs_of
from benchmarks._sass import compile_kernel, read_machine_code
from ptqc.attention import AttentionRequest
from ptqc.codegen.build import load_text
from ptqc.codegen.gpu.attend import MOST_RUNS, attention_tile
from ptqc.codegen.gpu.attention import attention_arguments, attention_text

__all__ = ["ATTENTION_CASES", "AttentionCase", "AttentionRow", "measure_attention"]

SHARED_BY_ONE = 99 * 1024
"""Bytes that a program may use on the smallest of the supported GPUs (sm_86, sm_89)."""


@dataclass(frozen=True)
class AttentionCase:
    """features: of a head; rows: queries that share a head of keys; mask: its dtype."""

    dtype: torch.dtype
    features: int
    rows: int
    mask: torch.dtype | None = torch.bool

    def __str__(self) -> str:
        names = (str(kind).removeprefix("torch.") for kind in (self.dtype, self.mask))
        return f"{self.features} features, {self.rows} rows, {', mask '.join(names)}"


@dataclass(frozen=True)
class AttentionRow:
    """What was counted. loop: instructions of the main loop for a key, of all warps."""

    case: str
    target: str
    tile: str
    loop: float
    registers: int
    spills: int
    shared: int
    programs: int
    matrices: str
    failures: tuple[str, ...]


ATTENTION_CASES = (
    *itertools.starmap(AttentionCase, itertools.product((torch.bfloat16, torch.float16), (64, 96, 128, 256), (4, 32))),
    AttentionCase(torch.bfloat16, 128, 64),
    AttentionCase(torch.bfloat16, 80, 1, torch.bfloat16),
    AttentionCase(torch.bfloat16, 128, 4, None),
    AttentionCase(torch.float32, 128, 4),
    AttentionCase(torch.float32, 64, 64),
)


def measure_attention(case: AttentionCase, capability: int) -> AttentionRow:
    """Compile, count, and hold against the gates: tensor cores, no spills, room for two programs of few rows."""
    from triton.backends.compiler import GPUTarget

    request = AttentionRequest(case.dtype, case.features, case.features, case.mask, "cuda")
    tile = attention_tile(request, case.rows)
    constants = {"BM": tile.rows, "BN": tile.keys, "RUNS": MOST_RUNS, "IS_SPLIT": True, "EMULATED": False}
    signature = attention_arguments(request)
    widths = ("q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row")
    aligned = [*(name for name in signature if name.endswith("_ptr")), *(widths if case.features % 16 == 0 else ())]
    constants["mask_key"] = 1
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = compile_kernel(
        load_text(attention_text(request)).attend, signature, constants, aligned, GPUTarget("cuda", capability, 32),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    code = read_machine_code(compiled)
    programs = programs_of(code, tile.warps, capability)
    return AttentionRow(
        str(case), f"sm_{capability}", f"{tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}",
        round(code.loop_length * tile.warps / tile.keys, 1), code.registers, code.spills, code.shared, programs,
        " ".join(code.matrices), tuple(_failures(code.spills + code.stack, code.shared, code.matrices, programs, case)),
    )  # fmt: skip


def _failures(
    spilled: int, shared: int, matrices: tuple[str, ...], programs: int, case: AttentionCase
) -> Iterator[str]:
    if spilled:
        yield f"{spilled} spills and bytes of stack"
    if not matrices:
        yield "no tensor cores"
    if shared > SHARED_BY_ONE:
        yield f"{shared} bytes of shared memory, not {SHARED_BY_ONE}"
    if programs < (2 if case.rows <= 16 and case.dtype != torch.float32 else 1):
        yield f"{programs} programs on a processor"
