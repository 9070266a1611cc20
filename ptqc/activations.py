"""Quantizing the input of a linear at run time: what integer and float8 kernels compute, bit for bit, and the numbers
that this stands for.

    token     scale[t] = max_i |x[t, i]| / largest        one per row, from the input itself
    tensor    one scale for all of x, from the input or (static) from calibration
    codes     round(x / scale) to int8, -127..127 (ties to even), or to float8 e4m3, -448..448

With an outlier threshold (LLM.int8: Dettmers, Lewis, Belkada, Zettlemoyer, 2022, arXiv:2208.07339, section 3.2) the
columns of x that hold some |x| above it keep their floating-point values, and the others are quantized as if those
columns were zero:

    y = sum over outlier i of x[i] W[:, i]  +  sum over the others of scale * codes[i] W[:, i]
"""

import torch
from torch import Tensor

from ptqc.act_spec import ActSpec
from ptqc.errors import PtqcError

__all__ = ["fake_quantize", "outlier_columns", "quantize_input", "static_scale"]

_CODES = {"int8": (torch.int8, 127.0), "fp8e4m3": (torch.float8_e4m3fn, 448.0)}
"""Type and largest value of the codes."""

_SMALLEST = 1e-30
"""Largest value that a row is taken to have if it has a smaller one: the scale of zeros is not zero."""


def quantize_input(x: Tensor, act: ActSpec, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of an input.

    x: [..., in] of any float dtype. act: has a dtype. scale: [] float32, for static specs only. Returns codes [..., in]
    (int8 or float8; zero in outlier columns) and scales float32, [..., 1] per token, [] for the tensor.

    Raises: PtqcError if the spec quantizes nothing, or a static one comes without its scale.
    """
    if act.dtype is None:
        raise PtqcError("this input stays in floating point (activation spec float): there are no codes")
    if act.outlier is not None:
        x = x.masked_fill(outlier_columns(x, act.outlier), 0)
    dtype, largest = _CODES[act.dtype]
    scale = _scale(x, act, largest, scale)
    steps = x.float() / scale
    steps = steps.round() if act.dtype == "int8" else steps
    return steps.clamp(-largest, largest).to(dtype), scale


def static_scale(absmax: Tensor, act: ActSpec) -> Tensor:
    """The scale [] float32 of a static spec, from the largest magnitude of each channel [..., in]."""
    assert act.dtype is not None
    return (absmax.amax() / _CODES[act.dtype][1]).clamp_min(torch.finfo(torch.float32).tiny).float()


def fake_quantize(x: Tensor, act: ActSpec, scale: Tensor | None = None) -> Tensor:
    """The numbers that the quantized input stands for, [..., in] in the dtype of x.

    Arguments as for `quantize_input`; a product with them is the integer product but for the rounding of floats.
    """
    codes, scale = quantize_input(x, act, scale)
    numbers = (codes.float() * scale).to(x.dtype)
    if act.outlier is None:
        return numbers
    return torch.where(outlier_columns(x, act.outlier), x, numbers)


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """Which columns of x [..., in] hold a value beyond the threshold: bool [in]."""
    return (x.abs() > threshold).reshape(-1, x.shape[-1]).any(0)


def _scale(x: Tensor, act: ActSpec, largest: float, scale: Tensor | None) -> Tensor:
    if act.is_static:
        if scale is None:
            raise PtqcError(f"{act} needs the scale that was calibrated (act_scale), but none was given")
        return scale.float()
    if x.numel() == 0:  # an expert that no token chose
        return torch.ones((*x.shape[:-1], 1) if act.scale == "token" else (), device=x.device)
    magnitude = x.abs().amax(-1, keepdim=True) if act.scale == "token" else x.abs().amax()
    return magnitude.float().clamp_min(_SMALLEST) / largest
