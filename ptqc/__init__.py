"""ptqc: a post-training-quantization compiler for PyTorch.

    model = ptqc.quantize(model, "hqq", bits=4)                     # in place
    fast = torch.compile(model, backend="ptqc")                     # kernels; also on a float model, with options
    ptqc.save(model, "out"); model = ptqc.load("out")               # a Hugging Face folder
    ptqc.export(model, "gguf", "model-Q4_0.gguf", quant="Q4_0", tokenizer="folder")   # or "gptq", "awq", ...: a folder

Importing this package imports neither torch nor transformers: names are loaded when they are first used.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from ptqc.act_spec import ActSpec
    from ptqc.api import quantize, report_of
    from ptqc.channel_importance import importance
    from ptqc.errors import PtqcError
    from ptqc.exports import export
    from ptqc.folders.checkpoint import load, save
    from ptqc.folders.flatten import flatten_state_dict, unflatten_state_dict
    from ptqc.folders.hf import PtqcConfig
    from ptqc.plan import plan
    from ptqc.qtensor import QuantTensor
    from ptqc.sites import inventory
    from ptqc.spec import WeightSpec

__all__ = [
    "ActSpec",
    "PtqcConfig",
    "PtqcError",
    "QuantTensor",
    "WeightSpec",
    "auto",
    "export",
    "flatten_state_dict",
    "importance",
    "inventory",
    "load",
    "plan",
    "quantize",
    "report_of",
    "save",
    "unflatten_state_dict",
]

__version__ = "0.1.0"

_HOMES = {
    "ActSpec": "ptqc.act_spec",
    "PtqcConfig": "ptqc.folders.hf",
    "PtqcError": "ptqc.errors",
    "QuantTensor": "ptqc.qtensor",
    "WeightSpec": "ptqc.spec",
    "auto": "ptqc.auto",
    "export": "ptqc.exports",
    "flatten_state_dict": "ptqc.folders.flatten",
    "importance": "ptqc.channel_importance",
    "inventory": "ptqc.sites",
    "load": "ptqc.folders.checkpoint",
    "plan": "ptqc.plan",
    "quantize": "ptqc.api",
    "report_of": "ptqc.api",
    "save": "ptqc.folders.checkpoint",
    "unflatten_state_dict": "ptqc.folders.flatten",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptqc' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_with_transformers(_: ModuleType) -> None:
    import_module("ptqc.folders.hf")


# transformers learns of our quantizer when it is imported, before or after ptqc.
register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
