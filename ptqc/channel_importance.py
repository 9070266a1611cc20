"""Importance of the input channels of weights: the mean square of what comes in by them on calibration data.

An error E in a weight [out, in] changes its output by E x, so the expected squared change is sum_i |E_i|^2 mean(x_i^2)
where the channels are uncorrelated. Export formats whose types are searched for the least such sum take it
(`ptqc.export(model, "gguf", ..., calibration=...)`); it is what llama.cpp calls an importance matrix.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ptqc.calibrate import batches
from ptqc.errors import PtqcError
from ptqc.passes.observe.run import observe
from ptqc.qtensor import QuantTensor
from ptqc.sites import find_sites, output_head

__all__ = ["importance"]


def importance(
    model: nn.Module,
    calibration: Any,
    tokenizer: Any = None,
    *,
    samples: int = 128,
    window: int = 512,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The importance of the input channels of every float matrix, the output head included, by its name.

    calibration, tokenizer, samples, window, seed: see `ptqc.quantize`. on_batch: called with (batches done, batches).
    Returns [in] float32, [experts, in] for a stack. The model is not changed.

    Raises: PtqcError for unusable data, or a model without float matrices.
    """
    drawn = batches(calibration, tokenizer, window=window, limit=samples, seed=seed)
    weights: dict[str, Tensor] = {site.name: site.weight for site in find_sites(model, drawn[0])[0]}
    head = output_head(model)
    for name, parameter in model.named_parameters():
        if parameter is head and not isinstance(parameter, QuantTensor):
            weights[name] = parameter
    if not weights:
        raise PtqcError("the model has no float matrix whose inputs could be observed; start from the float model")
    recorder = observe(model, drawn, {weight: {"mean_square"} for weight in weights.values()}, progress=on_batch)
    found = {}
    for name, weight in weights.items():
        if recorder.reason(weight) is None:
            found[name] = recorder.statistics(weight)["mean_square"].cpu()
    recorder.close()
    return found
