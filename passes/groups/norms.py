"""Norms: the ATen operators that normalise a value, and where their weight stands among the arguments."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["NORMS", "NormForm"]


@dataclass(frozen=True, slots=True)
class NormForm:
    """kind: in words. weight: its position. is_last: it lies along the last axes, not along axis 1. has_bias: behind
    the weight."""

    kind: str
    weight: int = 1
    is_last: bool = False
    has_bias: bool = True


_BATCH = NormForm("batch norm")

NORMS: Mapping[str, NormForm] = {
    "native_layer_norm": NormForm("layer norm", weight=2, is_last=True),
    "_fused_rms_norm": NormForm("RMS norm", weight=2, is_last=True, has_bias=False),
    "native_group_norm": NormForm("group norm"),
    "native_batch_norm": _BATCH,
    "_native_batch_norm_legit_no_training": _BATCH,
    "cudnn_batch_norm": _BATCH,
    "_batch_norm_no_update": _BATCH,
}
"""Operator -> its form."""
