"""From a request for attention to an operator: C++ on the CPU, Triton on GPUs; elsewhere torch's own serves."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from ptqc.attention import Attend, AttentionKernel, AttentionRequest, empty_result
from ptqc.codegen.cpp.attend import attend_in_cpp
from ptqc.codegen.gpu.attend import attend_in_triton

__all__ = ["attention_for"]

log = logging.getLogger("ptqc")
_LIBRARY = torch.library.Library("ptqc", "FRAGMENT")
_TARGETS: Mapping[str, Callable[[AttentionRequest], AttentionKernel | str]] = {
    "C++": attend_in_cpp,
    "Triton": attend_in_triton,
}
"""In the order in which they are asked."""


@cache
def attention_for(request: AttentionRequest) -> Attend | str:
    """The operator for a request, or why torch's attention is kept."""
    reasons = []
    for name, make in _TARGETS.items():
        found = make(request)
        if not isinstance(found, str):
            log.info("%s: %s", request, name)
            return _operator(found, request.value_features)
        reasons.append(f"{name}: {found}")
    log.info("%s: %s", request, "; ".join(reasons))
    return "; ".join(reasons)


def _operator(kernel: AttentionKernel, value_features: int) -> Attend:
    """ptqc::attend_<hash of the text>(q, k, v, mask, scale)."""
    name = f"attend_{hashlib.sha256(kernel.text.encode()).hexdigest()[:16]}"
    if not hasattr(torch.ops.ptqc, name):
        schema = f"{name}(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor"
        # Kernels take any strides. Else Inductor copies the mask for every layer, so as to be sure of its strides.
        _LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")

        def fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
            return empty_result(q, value_features)

        torch.library.register_fake(f"ptqc::{name}", fake, lib=_LIBRARY)
    operator: Attend = getattr(torch.ops.ptqc, name).default
    return operator
