"""A few instructions of PTX on arrays of 32-bit registers, so that generated programs can be run without a GPU."""

import re

import numpy as np

__all__ = ["run_ptx"]

_HALF = {"f16x2": np.float16, "bf16x2": None}


def run_ptx(text, outputs, registers):
    """Run a program. registers: arrays uint32 for $outputs, $outputs + 1, ..  Returns the arrays $0 .. ."""
    state = {f"${outputs + i}": np.asarray(register, np.uint32) for i, register in enumerate(registers)}
    pairs = re.sub(r"\{(\w+), (\w+)\}", r"\1|\2", text)
    for statement in re.sub(r"[{}]", "", pairs).split(";"):
        words = statement.strip().replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        name, target, *operands = words
        if "|" in target:
            state |= zip(target.split("|"), (state[operands[0]] & 0xFFFF, state[operands[0]] >> 16), strict=True)
            continue
        if "|" in operands[0]:
            low, high = (state[half] for half in operands[0].split("|"))
            state[target] = low | high << 16
            continue
        values = [state[o] if o in state else np.uint32(int(o, 0)) for o in operands]
        state[target] = _OPERATIONS[name.split(".")[0]](name, *values)
    return [state[f"${i}"] for i in range(outputs)]


def _pairs(register, kind):
    """The two floats of a register, float32."""
    halves = np.stack([register & 0xFFFF, register >> 16], -1).astype(np.uint32)
    if kind == "f16x2":
        return halves.astype(np.uint16).view(np.float16).astype(np.float64)
    return (halves << 16).view(np.float32).astype(np.float64)


def _packed(numbers, kind):
    """Rounded once, to nearest with ties to even."""
    if kind == "f16x2":
        bits = numbers.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        wide = numbers.astype(np.float32).view(np.uint32)
        bits = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    return bits[..., 0] | bits[..., 1] << 16


def _fma(name, a, b, c):
    kind = name.rsplit(".", 1)[1]
    a, b, c = (_pairs(np.atleast_1d(v), kind) for v in (a, b, c))
    return _packed(a * b + c, kind)


def _add(name, a, b):
    kind = name.rsplit(".", 1)[1]
    return _packed(_pairs(np.atleast_1d(a), kind) + _pairs(np.atleast_1d(b), kind), kind)


def _mul(name, a, b):
    kind = name.rsplit(".", 1)[1]
    return _packed(_pairs(np.atleast_1d(a), kind) * _pairs(np.atleast_1d(b), kind), kind)


def _lop3(name, a, b, c, table):
    assert table == 0xEA
    return (a & b) | c


def _prmt(name, a, b, selector):
    eight = [(a >> np.uint32(8 * i)) & 255 for i in range(4)] + [(b >> np.uint32(8 * i)) & 255 for i in range(4)]
    eight = np.stack(np.broadcast_arrays(*eight, np.atleast_1d(selector) * 0)[:8], -1)
    total = np.uint32(0)
    for i in range(4):
        nibble = (np.atleast_1d(selector) >> np.uint32(4 * i)) & 15
        assert not (nibble & 8).any()  # would copy the sign of a byte
        chosen = np.take_along_axis(eight, np.broadcast_to(nibble, eight.shape[:-1])[..., None], -1)[..., 0]
        total = total | chosen.astype(np.uint32) << np.uint32(8 * i)
    return total


_OPERATIONS = {
    "mov": lambda name, a: a,
    "shr": lambda name, a, by: a >> by,
    "shl": lambda name, a, by: a << by,
    "and": lambda name, a, b: a & b,
    "lop3": _lop3,
    "prmt": _prmt,
    "fma": _fma,
    "add": _add,
    "mul": _mul,
}
