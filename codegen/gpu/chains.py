"""Text of prologues and epilogues: one row per fusion, in float32, on tiles that lie transposed.

An epilogue works on y [outputs, rows] (the product lies that way in registers). Behind a gate the tile has half the
outputs. Gates need gate and up side by side, so `prepare` interleaves the rows of such weights: stored row 2 i is
output i, stored row 2 i + 1 output i + out / 2; operands before the gate are read in that order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ptqc.fusions import narrows, takes_operand
from ptqc.requests import KernelRequest

__all__ = ["EPILOGUE_HELPERS", "Tail", "epilogue_lines", "operand_names", "prologue_lines", "step_operands"]

EPILOGUE_HELPERS = """@triton.jit
def tanh(v):
    return 2.0 * tl.sigmoid(2.0 * v) - 1.0


@triton.jit
def gate_and_up(y, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(y, (OUTPUTS // 2, 2, ROWS)), (0, 2, 1)))"""

_ACTIVATIONS = {
    "silu": "{v} * tl.sigmoid({v})",
    "gelu": "0.5 * {v} * (1.0 + tl.erf({v} * 0.7071067811865476))",
    "gelu_tanh": "0.5 * {v} * (1.0 + tanh(0.7978845608028654 * ({v} + 0.044715 * {v} * {v} * {v})))",
    "relu": "tl.maximum({v}, 0.0)",
    "relu2": "tl.maximum({v}, 0.0) * tl.maximum({v}, 0.0)",
    "sigmoid": "tl.sigmoid({v})",
    "tanh": "tanh({v})",
}
_VECTOR = "tl.load({p} + index, mask=index < {width}, other=0.0).to(tl.float32)[:, None]"
_MATRIX = "tl.load({p} + rm[None, :] * {width} + index[:, None], mask=rows_in & (index < {width})[:, None], other=0.0)"
_OPERANDS = {
    "bias": f"y + {_VECTOR}",
    "scale": f"y * {_VECTOR}",
    "add": f"y + {_MATRIX}.to(tl.float32)",
    "mul": f"y * {_MATRIX}.to(tl.float32)",
}


@dataclass(frozen=True, slots=True)
class Tail:
    """Lines that turn y [BN, BM] into what is stored, at `index` of `width` features."""

    lines: tuple[str, ...]
    width: str


def step_operands(names: Sequence[str], prefix: str) -> list[str | None]:
    """Pointer of every step's operand, or None."""
    return [f"{prefix}{i}_ptr" if takes_operand(name) else None for i, name in enumerate(names)]


def operand_names(request: KernelRequest) -> list[str]:
    """Pointers of the epilogue's operands, in order."""
    return [name for name in step_operands(request.epilogue, "e") if name]


def epilogue_lines(request: KernelRequest) -> Tail:
    """Lines of an epilogue. They read y, rn [BN] (stored rows), rm [BM], rows_in [1, BM], N, and leave y and index."""
    has_gate = any(map(narrows, request.epilogue))
    lines = ["index = (rn % 2) * (N // 2) + rn // 2" if has_gate else "index = rn"]
    width = "N"
    for name, pointer in zip(request.epilogue, step_operands(request.epilogue, "e"), strict=True):
        if name in _OPERANDS:
            lines.append(f"y = {_OPERANDS[name].format(p=pointer, width=width)}")
        elif narrows(name):
            activation = _ACTIVATIONS[name.removeprefix("gate_")].format(v="gate")
            width = "(N // 2)"
            lines += [
                "gate, up = gate_and_up(y, BN, BM)",
                f"y = {activation} * up",
                "index = tile * (BN // 2) + tl.arange(0, BN // 2)",
            ]
        else:
            lines.append(f"y = {_ACTIVATIONS[name].format(v='y')}")
    return Tail(tuple(lines), width)


def prologue_lines(request: KernelRequest) -> list[str]:
    """Lines that leave v, float32, the input of row `row` at k after the prologue; k [..] and inside [..] are given.

    An order asks for the values before it elsewhere: places are followed from the last step to the first.
    """
    steps = list(zip(request.prologue, step_operands(request.prologue, "p"), strict=True))
    places, lines = ["k"], []
    for i, (name, pointer) in reversed(list(enumerate(steps))):
        if name == "order":
            lines.append(f"at{i} = tl.load({pointer} + {places[0]}, mask=inside, other=0)")
            places.insert(0, f"at{i}")
        else:
            places.insert(0, places[0])
    lines.append(f"v = tl.load(x_ptr + row.to(tl.int64) * K + {places[0]}, mask=inside, other=0.0).to(tl.float32)")
    for (name, pointer), place in zip(steps, places[1:], strict=True):
        if name.startswith("rms_norm"):
            eps = name.partition(":")[2]
            lines.append(f"v = v * tl.rsqrt(tl.sum(v * v) / K + {float(eps)})")
        if name != "order":
            lines.append(f"v = v * tl.load({pointer} + {place}, mask=inside, other=0.0).to(tl.float32)")
    return lines
