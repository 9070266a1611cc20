"""Weight-only products on GPUs: every spec that has a form on 16-bit words, written for Triton.

See `ptqc.codegen.gpu` for the layouts and loop nests, docs/kernels.md for what they cost.
"""

from typing import ClassVar

from ptqc.codegen.gpu.forms import WeightForm, form_of
from ptqc.codegen.gpu.inputs import enter_text, needs_entry
from ptqc.codegen.gpu.module import WIDEST_ROW, module_text, refused_by_all
from ptqc.codegen.gpu.weight_only import finish_text, product_text
from ptqc.requests import TARGETS, KernelRequest, KernelSource

__all__ = ["TritonLinear"]


@TARGETS.register("triton_linear")
class TritonLinear:
    """Weights of any spec, activations in floating point."""

    rank: ClassVar[int] = 100

    def refuses(self, request: KernelRequest) -> str | None:
        """Devices without Triton, derivatives, quantized inputs, groups that no tensor core can follow."""
        reason = refused_by_all(request)
        if reason is not None:
            return reason
        if request.act.dtype is not None:
            return f"{request.act} activations are another target's"
        if needs_entry(request) and request.k > WIDEST_ROW:
            return f"prologues hold a row in registers: at most {WIDEST_ROW} inputs, not {request.k}"
        form = form_of(request.spec, request.k, request.dtype)
        return form if isinstance(form, str) else None

    def emit(self, request: KernelRequest) -> KernelSource:
        """See `ptqc.codegen.gpu.weight_only`."""
        form = form_of(request.spec, request.k, request.dtype)
        assert isinstance(form, WeightForm)
        kernels = {"matmul": product_text(request, form), "finish": finish_text(request)}
        if needs_entry(request):
            kernels["enter"] = enter_text(request, None)
        return KernelSource(module_text(request, "Linear", kernels, [*kernels, "unpack"]))
