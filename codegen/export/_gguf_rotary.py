"""Rotary position embeddings in GGUF: the base frequency, and the scalings that extend the context.

Four kinds of scaling have a counterpart. *default*: none. *linear*: every frequency divided by one factor, a key.
*yarn*: frequencies and attention scaled by wavelength, keys (Peng et al. 2023, arXiv:2309.00071). *llama3*:
frequencies divided by factors that depend on the wavelength, a tensor of these factors.
"""

import math
from typing import Any

import torch
from gguf import GGUFValueType, Keys, RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ptqc.errors import ExportError

__all__ = ["rotary_factors", "rotary_fields"]

UINT, FLOAT, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING

_Row = tuple[str, GGUFValueType, Any]

_SCALINGS: dict[str, RopeScalingType | None] = {
    "default": None,
    "llama3": None,
    "linear": RopeScalingType.LINEAR,
    "yarn": RopeScalingType.YARN,
}
"""Kinds of scaling, and the type that llama.cpp must be told."""

_WIDE, _NARROW = "full_attention", "sliding_attention"
"""Kinds of layers that may have parameters of their own."""

_FIXED = {"partial_rotary_factor": 1.0, "truncate": True, "beta_fast": 32, "beta_slow": 1}
"""Parameters that llama.cpp does not read from the file (November 2026), and the values it takes."""


def _parameters(config: Any) -> dict[str, Any]:
    """The rotary parameters; before transformers 5 the base stood beside the scaling."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = found.get(_WIDE, found)
    return {"rope_type": "default", "rope_theta": getattr(config, "rope_theta", 10000.0), **found}


def rotary_fields(config: Any, rotates_partly: bool = False) -> list[_Row]:
    """Metadata rows (key, type, value); a row without a value is to be left out. rotates_partly: whether llama.cpp
    reads how much of a head is rotated.

    Raises: ExportError for a scaling, or a parameter of one, that has no counterpart.
    """
    parameters = _parameters(config)
    kind = parameters["rope_type"]
    if kind not in _SCALINGS:
        raise ExportError(f"gguf has no counterpart of the rotary scaling {kind!r}; it has {', '.join(_SCALINGS)}")
    for name, value in _FIXED.items():
        if parameters.get(name) not in (None, value) and not (rotates_partly and name == "partial_rotary_factor"):
            raise ExportError(f"llama.cpp rotates with {name}={value}, this model has {parameters[name]}")
    rows: list[_Row] = [(Keys.Rope.FREQ_BASE, FLOAT, parameters["rope_theta"])]
    narrow = (getattr(config, "rope_parameters", None) or {}).get(_NARROW)
    if narrow is not None:
        if narrow.get("rope_type", "default") != "default":
            raise ExportError(f"llama.cpp does not scale frequencies of sliding layers, this model has {narrow}")
        rows.append((Keys.Rope.FREQ_BASE_SWA, FLOAT, narrow["rope_theta"]))
    scaling = _SCALINGS[kind]
    if scaling is not None:
        rows.append((Keys.Rope.SCALING_TYPE, STRING, scaling.value))
        rows.append((Keys.Rope.SCALING_FACTOR, FLOAT, parameters["factor"]))
    return rows + (_yarn_fields(config, parameters) if kind == "yarn" else [])


def _yarn_fields(config: Any, parameters: dict[str, Any]) -> list[_Row]:
    """llama.cpp scales attention by 1 + 0.1 ln(factor) on its own account; its key multiplies that."""
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    own = 0.1 * math.log(parameters["factor"]) + 1
    return [
        (Keys.Rope.SCALING_ORIG_CTX_LEN, UINT, parameters.get("original_max_position_embeddings")),
        (Keys.Rope.SCALING_ATTN_FACTOR, FLOAT, attention / own),
    ]


def rotary_factors(config: Any) -> Tensor | None:
    """What each frequency is divided by, [head_dim / 2] float32, where that is a tensor in the file."""
    parameters = _parameters(config)
    if parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    factors: Tensor = float(parameters["rope_theta"]) ** -exponents / scaled
    return factors
