"""Pass fuse-input-quantization: kernels that quantize the input of a product themselves.

1. site(ptqc::fake_quantize(u, act, scale))   -> site(u), its request saying act, with the scale as an operand if static
It fires if any target serves the longer request, whoever serves the shorter one: kernels on integers are others. It
comes before sites are merged and before anything else moves into them, so that these steps are asked of that kernel.
It does not fire where u is of another dtype or is written in place somewhere, and in training.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from ptqc import ops
from ptqc.act_spec import ActSpec
from ptqc.passes.lower.site import erase_unused, movable, operands_of, request_of, rewrite, x_of
from ptqc.pipeline import Context, Pass
from ptqc.program import value_of

__all__ = ["FuseInputQuantization"]


@dataclass(frozen=True)
class FuseInputQuantization(Pass):
    """Rule 1 for every site."""

    name: ClassVar[str] = "fuse-input-quantization"

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many sites quantize their input now."""
        sites, unsafe = movable(module.graph, context)
        return sum(_fuse(context, site, unsafe) for site in sites)


def _fuse(context: Context, site: fx.Node, unsafe: frozenset[fx.Node]) -> bool:
    x, request = x_of(site), request_of(site)
    if x.target is not ops.fake_quantize:
        return False
    u, act, scale = x.args
    assert isinstance(u, fx.Node)
    if u in unsafe or value_of(u).dtype != request.dtype:
        return False
    quantized = replace(request, act=ActSpec.parse(str(act)))
    if context.target(quantized) is None:
        reasons = "; ".join(f"{target}: {reason}" for target, reason in context.refusals(quantized))
        context.sites[site].left.append(f"{act} ({reasons})")
        return False
    operands = operands_of(site)
    rewrite(site, quantized, u, [scale, *operands] if isinstance(scale, fx.Node) else operands)
    erase_unused(x)
    return True
