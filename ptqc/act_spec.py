"""ActSpec: how the input of a linear is treated at run time. Its name parses back: `ActSpec.parse(str(act)) == act`.

float   int8-token   int8-tensor-static   fp8e4m3-token   int8-token-outlier6
"""

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ptqc.errors import SpecError

__all__ = ["ActSpec"]

_ACT_GRAMMAR = re.compile(
    r"(?P<dtype>int8|fp8e4m3)-(?P<scale>token|tensor)(?P<static>-static)?(?:-outlier(?P<outlier>[0-9][0-9.e+-]*))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActSpec:
    """How the input of a linear is treated at run time; belongs to the site, not to the weight.

    dtype: None keeps it in floating point. scale: one per token (row), or one for the tensor. `static` scales were
    calibrated; dynamic ones are computed from the input. outlier: channels above it stay in 16 bit (LLM.int8).
    """

    dtype: Literal["int8", "fp8e4m3"] | None = None
    scale: Literal["token", "tensor"] = "token"
    is_static: bool = False
    outlier: float | None = None

    def __post_init__(self) -> None:
        if self.dtype is None and (self.scale, self.is_static, self.outlier) != ("token", False, None):
            raise SpecError("an input that stays in floating point has no scale and no outliers; give a dtype")
        if self.is_static and self.scale == "token":
            raise SpecError('a scale per token is computed from the input; static scales need scale="tensor"')
        if self.outlier is not None and not 0 < self.outlier < math.inf:
            raise SpecError(f"the threshold of outliers is positive and finite (LLM.int8 has 6), not {self.outlier}")

    def __str__(self) -> str:
        if self.dtype is None:
            return "float"
        suffix = "-static" if self.is_static else ""
        outlier = "" if self.outlier is None else f"-outlier{_shortest(self.outlier)}"
        return f"{self.dtype}-{self.scale}{suffix}{outlier}"

    @staticmethod
    def parse(name: str) -> "ActSpec":
        """The spec that a name stands for.

        >>> str(ActSpec.parse("int8-token-outlier6"))
        'int8-token-outlier6'

        Raises: SpecError with the grammar if the name does not parse.
        """
        return _parse_act(name)


@lru_cache(maxsize=1024)
def _parse_act(name: str) -> ActSpec:
    if name == "float":
        return ActSpec()
    match = _ACT_GRAMMAR.fullmatch(name)
    try:
        outlier = float(match["outlier"]) if match and match["outlier"] else None
    except ValueError:
        match = None
    if match is None:
        raise SpecError(
            f"{name!r} is no activation spec; use float or <int8|fp8e4m3>-<token|tensor>[-static][-outlier<number>], "
            "for example int8-token or int8-tensor-static"
        )
    dtype: Literal["int8", "fp8e4m3"] = "int8" if match["dtype"] == "int8" else "fp8e4m3"
    scale: Literal["token", "tensor"] = "token" if match["scale"] == "token" else "tensor"
    return ActSpec(dtype=dtype, scale=scale, is_static=match["static"] is not None, outlier=outlier)


def _shortest(number: float) -> str:
    """The shortest spelling that reads back as the same number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)
