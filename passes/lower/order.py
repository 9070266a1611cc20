"""The lowering passes, in the order in which they run."""

from collections.abc import Mapping

from torch import fx, nn

from ptqc.passes.lower.emit_kernels import EmitKernels
from ptqc.passes.lower.fuse_epilogue import FuseEpilogue
from ptqc.passes.lower.fuse_input_quantization import FuseInputQuantization
from ptqc.passes.lower.fuse_prologue import FusePrologue
from ptqc.passes.lower.lower_attention import LowerAttention
from ptqc.passes.lower.lower_experts import LowerExperts
from ptqc.passes.lower.lower_linears import LowerLinears
from ptqc.passes.lower.merge_shared_input import MergeSharedInput
from ptqc.passes.lower.quantize_weights import QuantizeWeights, Store
from ptqc.pipeline import Pipeline

__all__ = ["lowering"]


def lowering(
    parameters: Mapping[fx.Node, nn.Parameter], names: Mapping[fx.Node, str], store: Store | None = None
) -> Pipeline:
    """From an unlifted graph to one that calls kernels.

    parameters, names: from `unlift`. store: see `QuantizeWeights`.
    """
    return Pipeline(
        [
            QuantizeWeights(parameters, names, store),
            LowerExperts(dict(names)),
            LowerLinears(dict(names)),
            FuseInputQuantization(),
            MergeSharedInput(),
            FusePrologue(),
            FuseEpilogue(),
            EmitKernels(),
            LowerAttention(),
        ]
    )
