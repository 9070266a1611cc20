"""Surroundings of every kind with extras that fit, for weights of any shape."""

import torch

from ptqc.act_spec import ActSpec
from ptqc.hadamard import rotation_name
from ptqc.methods import METHODS, quantize_weight
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings

KINDS = ("scale", "order", "input rotation", "output rotation", "int8", "static", "outliers", "everything")


def surroundings(kind, shape):
    """The surroundings of a kind for a stored shape [*lead, out, in]."""
    into, out_of = rotation_name(shape[-1]), rotation_name(shape[-2])
    int8 = ActSpec(dtype="int8")
    return {
        "scale": Surroundings(input_scale=True),
        "order": Surroundings(order=True),
        "input rotation": Surroundings(input_rotation=into),
        "output rotation": Surroundings(output_rotation=out_of),
        "int8": Surroundings(act=int8),
        "static": Surroundings(act=ActSpec(dtype="int8", scale="tensor", is_static=True)),
        "outliers": Surroundings(act=ActSpec(dtype="int8", outlier=2.5)),
        "everything": Surroundings(True, True, into, out_of, int8),
    }[kind]


def extras_for(around, shape, seed=3):
    """Random extras of these surroundings."""
    seeded = torch.Generator().manual_seed(seed)
    made = {
        "input_scale": lambda size: torch.rand(size, generator=seeded) + 0.5,
        "order": lambda size: torch.rand(size, generator=seeded).argsort(-1).int(),
        "input_signs": lambda size: (torch.randint(0, 2, size, generator=seeded) * 2 - 1).to(torch.int8),
        "output_signs": lambda size: (torch.randint(0, 2, size, generator=seeded) * 2 - 1).to(torch.int8),
        "act_scale": lambda size: torch.tensor(0.03),
    }
    return {name: made[name](size) for name, (size, _) in around.layout(shape).items()}


def surrounded(kind, shape, spec="int8g32", dtype=torch.float32, is_transposed=False):
    """A random weight of the stored shape with its surroundings: (float weight, QuantTensor), both as used."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = weight.mT.contiguous() if is_transposed else weight
    around = surroundings(kind, shape)
    stored = quantize_weight(
        weight, METHODS.get("rtn")(), WeightSpec.parse(spec), is_transposed=is_transposed,
        surroundings=around, extras=extras_for(around, shape),
    )  # fmt: skip
    return weight, stored
