"""Text of the kernel that runs before the product: the prologue, the quantization of the input, sums over groups.

One program per row; the row lies in registers, [groups, inputs of a group] where sums over groups are asked for.

    codes[m, k] = round(v[m, k] / scale[m])      sums[m, g] = sum over the group of codes
"""

import torch

from ptqc.act_spec import ActSpec
from ptqc.codegen.gpu.chains import prologue_lines, step_operands
from ptqc.requests import KernelRequest

__all__ = ["enter_text", "needs_entry", "prologue_pointers"]

_LARGEST = {"int8": "127.0", "fp8e4m3": "448.0"}
_CODES = {"int8": "tl.int8", "fp8e4m3": "tl.float8e4nv"}
_TYPES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16", torch.float32: "tl.float32"}


def needs_entry(request: KernelRequest) -> bool:
    """True if something happens to the input before the product."""
    return bool(request.prologue) or request.act.dtype is not None


def prologue_pointers(request: KernelRequest) -> list[str]:
    """Pointers of the prologue's operands and of a scale given from outside, in order."""
    given = ["given_ptr"] if request.act.dtype is not None and request.act.scale == "tensor" else []
    return [name for name in step_operands(request.prologue, "p") if name] + given


def enter_text(request: KernelRequest, group: int | None) -> str:
    """The kernel `enter`. group: inputs that are summed, None for no sums."""
    results = ["v_ptr", *(["scale_ptr"] if request.act.dtype else []), *(["sums_ptr"] if group else [])]
    pointers = ", ".join(["x_ptr", *prologue_pointers(request), *results])
    lines = ["row = tl.program_id(0)"]
    if group:
        lines += [
            "at, within = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]",
            f"k = at * {group} + within",
            f"inside = (within < {group}) & (k < K)",
        ]
    else:
        lines += ["k = tl.arange(0, WIDTH)[None, :]", "inside = k < K"]
    lines += prologue_lines(request)
    lines += _store_lines(request.act, request.dtype)
    if group:
        count = f"tl.cdiv(K, {group})"
        lines.append(
            f"tl.store(sums_ptr + row * {count} + tl.arange(0, GROUPS), tl.sum(codes, 1), "
            f"mask=tl.arange(0, GROUPS) < {count})"
        )
    body = "\n    ".join(lines)
    return f"""@triton.jit
def enter({pointers}, K, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    {body}"""


def _store_lines(act: ActSpec, dtype: torch.dtype) -> list[str]:
    at = "row.to(tl.int64) * K + k"
    if act.dtype is None:
        return [f"tl.store(v_ptr + {at}, v.to({_TYPES[dtype]}), mask=inside)"]
    largest = _LARGEST[act.dtype]
    # As in ptqc.activations: the prologue's result is rounded to the type of the input before it is quantized.
    lines = [f"v = v.to({_TYPES[dtype]}).to(tl.float32)"]
    if act.scale == "token":
        lines.append(f"scale = tl.maximum(tl.max(tl.abs(v)), 1e-30) / {largest}")
    else:
        lines.append("scale = tl.load(given_ptr)")
    lines.append("tl.store(scale_ptr + row, scale)")
    lines.append("codes = tl.div_rn(v, scale + tl.zeros_like(v))")
    if act.dtype == "int8":  # adding and taking away 1.5 * 2^23 rounds to nearest, ties to even
        lines.append("codes = (codes + 12582912.0) - 12582912.0")
    else:  # round to the nearest e4m3 here: not every conversion does, and then all are exact
        lines += [
            "bits = codes.to(tl.int32, bitcast=True)",
            "near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)",
            "codes = tl.where(tl.abs(codes) < 0.015625, (codes + 24576.0) - 24576.0, near)",
        ]
    lines.append(f"codes = tl.minimum(tl.maximum(codes, -{largest}), {largest})")
    lines.append(f"tl.store(v_ptr + {at}, codes.to({_CODES[act.dtype]}), mask=inside)")
    return lines
