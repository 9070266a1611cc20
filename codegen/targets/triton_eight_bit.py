"""Products on GPUs of inputs quantized at run time to int8 or float8 (see `ptqc.codegen.gpu.eight_bit`)."""

from typing import ClassVar

import torch

from ptqc.codegen.gpu.eight_bit import eight_bit_form, eight_bit_text, summed_group
from ptqc.codegen.gpu.forms import WeightForm
from ptqc.codegen.gpu.inputs import enter_text
from ptqc.codegen.gpu.module import WIDEST_ROW, module_text, refused_by_all
from ptqc.requests import TARGETS, KernelRequest, KernelSource

__all__ = ["TritonEightBit"]


@TARGETS.register("triton_eight_bit")
class TritonEightBit:
    """Inputs in int8 with weights of integer levels, inputs in float8 with float8 weights."""

    rank: ClassVar[int] = 100

    def refuses(self, request: KernelRequest) -> str | None:
        """Devices without Triton, derivatives, inputs in floating point or with outliers, levels that are no int8."""
        reason = refused_by_all(request)
        if reason is not None:
            return reason
        if request.act.dtype is None:
            return "activations in floating point are another target's"
        if request.act.outlier is not None:
            return f"the outliers of {request.act} need a second product"
        if request.k > WIDEST_ROW:
            return f"a row is quantized in registers: at most {WIDEST_ROW} inputs, not {request.k}"
        if request.act.dtype == "fp8e4m3" and request.device == "cuda" and not _has_float8():
            return "float8 tensor cores are there from sm_89 on"
        form = eight_bit_form(request)
        return form if isinstance(form, str) else None

    def emit(self, request: KernelRequest) -> KernelSource:
        """See `ptqc.codegen.gpu.eight_bit`."""
        form = eight_bit_form(request)
        assert isinstance(form, WeightForm)
        kernels = {
            "matmul": eight_bit_text(request, form),
            "enter": enter_text(request, summed_group(request, form)),
        }
        return KernelSource(module_text(request, "EightBitLinear", kernels, list(kernels), act=str(request.act)))


def _has_float8() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)
