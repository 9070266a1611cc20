"""The reference target: dequantize and multiply. Serves every request, on every device, with derivatives."""

from typing import ClassVar

from ptqc.requests import TARGETS, KernelRequest, KernelSource

__all__ = ["Reference"]


@TARGETS.register("reference")
class Reference:
    """`ptqc::linear` itself."""

    rank: ClassVar[int] = 1000

    def refuses(self, request: KernelRequest) -> str | None:
        """Never."""
        return None

    def emit(self, request: KernelRequest) -> KernelSource:
        """The existing operator."""
        return KernelSource(operator="ptqc::linear")
