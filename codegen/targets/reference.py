"""The reference target: dequantize and multiply. Serves every plain request, on every device, with derivatives."""

from typing import ClassVar

from ptqc.requests import TARGETS, KernelRequest, KernelSource

__all__ = ["Reference"]


@TARGETS.register("reference")
class Reference:
    """`ptqc::linear` itself."""

    rank: ClassVar[int] = 1000

    def refuses(self, request: KernelRequest) -> str | None:
        """Whatever has fusions besides a bias."""
        if not request.is_plain:
            return "the reference is plain operators: it fuses nothing but a bias"
        return None

    def emit(self, request: KernelRequest) -> KernelSource:
        """The existing operator."""
        return KernelSource(operator="ptqc::linear")
