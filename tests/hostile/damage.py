"""Ways to damage files: their bytes, their JSON, their tensors. Every choice is drawn from `rng`."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

NUMBERS = (
    -(2**63), -(2**31), -64, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 4096,
    2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 10**30, -0.5, 0.5, 1.5, 1e-300, 1e300,
    float("inf"), float("nan"),
)  # fmt: skip
WORDS = (
    "", "int", "int4", "int4g32", "int4g32z", "int8g64", "nf4", "float", "float16", "bfloat16", "torch.float16",
    "int32",
    "gptq", "awq", "gptq_v2", "gemm", "Linear", "re:.*", "re:(", "re:(a+)+$", "token", "tensor", "channel", "group",
    "*", "up", "down.weight", "norm.weight", "true", "none", "x" * 3000, "../x", "a\nb", "\0", "ü\ud800",
)  # fmt: skip
DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.bool, torch.float8_e4m3fn, torch.complex64,
)  # fmt: skip


def number(rng: Random, width: int) -> int:
    """Of `width` bytes: small, large, all of its bits, or any."""
    return rng.choice([rng.randrange(300), 2 ** (8 * width - 1), 2 ** (8 * width) - 1, rng.getrandbits(8 * width)])


def damaged_bytes(rng: Random, data: bytes, head: int | None = None) -> bytes:
    """A few edits of a file. head: where most of them go, its first bytes."""
    broken = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = min(len(broken), head or len(broken)) if rng.random() < 0.7 else len(broken)
        at, width = rng.randrange(max(1, end)), rng.choice((1, 2, 4, 8))
        match rng.choice(("number", "number", "number", "flip", "cut", "drop", "repeat", "junk")):
            case "number":
                broken[at : at + width] = (number(rng, width) % 2 ** (8 * width)).to_bytes(width, "little")
            case "flip" if broken:
                broken[at] ^= 1 << rng.randrange(8)
            case "cut":
                del broken[at:]
            case "drop":
                del broken[at : at + rng.randint(1, 40)]
            case "repeat" if rng.random() < 0.05:
                broken[at:at] = rng.choice((b"[", b'{"a":', b"- ", b"9")) * 20_000
            case "repeat":
                broken[at:at] = broken[at : at + rng.randint(1, 40)]
            case _:
                broken[at:at] = rng.randbytes(rng.randint(1, 20))
    return bytes(broken)


def value(rng: Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: None, lambda: rng.random() < 0.5, lambda: rng.choice(NUMBERS), lambda: rng.choice(NUMBERS),
        lambda: rng.choice(WORDS), lambda: rng.choice(WORDS),
        lambda: [value(rng, depth - 1) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(WORDS): value(rng, depth - 1) for _ in range(rng.randrange(3))},
    )  # fmt: skip
    return rng.choice(kinds if depth else kinds[:6])()


def damaged_json(rng: Random, root: Any) -> None:
    """Change one place of nested lists and mappings: another value, one from elsewhere, none, or one more."""
    places = list(_places(root))
    if not places:
        return
    holder, key = rng.choice(places)
    match rng.choice(("value", "value", "drop", "swap", "more", "nudge", "nudge", "deep")):
        case "value":
            holder[key] = value(rng)
        case "drop":
            del holder[key]
        case "swap":
            other, its = rng.choice(places)
            holder[key], other[its] = json.loads(json.dumps([other[its], holder[key]]))
        case "more" if isinstance(holder, dict):
            holder[rng.choice(WORDS)] = value(rng)
        case "more":
            holder.insert(rng.randrange(len(holder) + 1), value(rng))
        case "nudge" if isinstance(holder[key], (int, float)):
            old = holder[key]
            holder[key] = rng.choice((old * 2, old + 1, old - 1, -old, old * 32))
        case "nudge" if isinstance(holder[key], str):
            holder[key] = rng.choice((holder[key] + "x", holder[key][1:], holder[key].upper()))
        case "deep":
            holder[key] = json.loads("[" * 200 + "]" * 200) if rng.random() < 0.3 else {"a": holder[key]}
        case _:
            holder[key] = value(rng)


def _places(node: Any) -> Any:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in list(items):
        yield node, key
        yield from _places(inner)


def damaged_tensors(rng: Random, tensors: dict[str, Tensor]) -> None:
    """Drop, cut, cast, reshape, overwrite, exchange or rename a tensor."""
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    match rng.choice(
        ("drop", "rename", "cut", "cast", "view", "shape", "bytes", "swap", "copy", "fill", "one", "grow")
    ):
        case "drop":
            del tensors[name]
        case "rename":
            tensors[rng.choice((f"{name}x", f"x.{name}", name.rpartition(".")[0] or "x", *tensors))] = tensors.pop(name)
        case "cut" if old.ndim:
            axis = rng.randrange(old.ndim)
            tensors[name] = old.narrow(axis, 0, min(old.shape[axis], rng.choice((0, 1, 2, old.shape[axis] // 2))))
        case "cast":
            tensors[name] = (old.real if old.is_complex() else old).float().nan_to_num().to(rng.choice(DTYPES))
        case "view" if old.ndim and old.numel():
            fitting = [d for d in DTYPES if d != torch.bool and d.itemsize == old.element_size()]
            tensors[name] = old.view(rng.choice(fitting))
        case "shape":
            shapes = ((-1,), (1, *old.shape), (*old.shape, 1), tuple(reversed(old.shape)))
            tensors[name] = old.reshape(rng.choice(shapes))
        case "bytes":
            raw = torch.tensor(list(rng.randbytes(old.numel() * old.element_size())), dtype=torch.uint8)
            tensors[name] = (raw & 1).bool().view(old.shape) if old.dtype == torch.bool else raw.view(old.dtype).view(
                old.shape
            )
        case "swap":
            other = rng.choice(sorted(tensors))
            tensors[name], tensors[other] = tensors[other], old
        case "copy":
            tensors[name] = tensors[rng.choice(sorted(tensors))]
        case "fill":
            tensors[name] = torch.full_like(old.double(), float(rng.choice(NUMBERS))).nan_to_num(
                *([0.0] * (rng.random() < 0.5))
            ).to(old.dtype)
        case "one" if old.numel():
            changed = old.double().flatten()
            changed[rng.randrange(len(changed))] = float(rng.choice(NUMBERS))
            tensors[name] = changed.to(old.dtype).view(old.shape)
        case _:
            tensors[name] = old.expand(rng.choice((0, 2, 3)), *old.shape)
