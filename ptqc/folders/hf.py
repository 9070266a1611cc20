"""The transformers quantizer: `from_pretrained` reads folders that ptqc wrote, and quantizes while loading if asked.

`import ptqc` registers it as soon as transformers is imported, before or after. Works with transformers 5.17 to 5.23:

    AutoModelForCausalLM.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=PtqcConfig(method="hqq", bits=4))
"""

import logging
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptqc.assign import assign, quantize_site
from ptqc.errors import CheckpointError, PtqcError
from ptqc.folders.architecture import planned_dtype
from ptqc.folders.flatten import parts_of, untied
from ptqc.folders.manifest import METHOD, Manifest, StoredWeight, manifest_of
from ptqc.folders.safefile import read_safefile
from ptqc.qtensor import QuantTensor
from ptqc.recipe import make_rule, recipe_of, recipe_rows, remember
from ptqc.select import Patterns
from ptqc.sites import find_sites, select_sites
from ptqc.surroundings import EXTRAS

__all__ = ["PtqcConfig", "PtqcQuantizer", "attach"]

log = logging.getLogger("ptqc")

_PARTS = ("codes", "scale_outer", "scale_offset", "scale", "zero_outer", "zero", *EXTRAS)


class PtqcConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What a folder says about its quantized weights, or what to do to a float model while it is loaded.

    method, bits, group_size, spec, include, exclude: as for `ptqc.quantize`. stored: what config.json says; given by
    transformers.
    """

    def __init__(
        self,
        method: str | None = None,
        bits: float | None = None,
        group_size: int | None = None,
        spec: str | None = None,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        options: Mapping[str, Any] | None = None,
        **stored: Any,
    ) -> None:
        self.quant_method = METHOD
        self.request = {"bits": bits, "group_size": group_size, "spec": spec, "options": options}
        self.method, self.include, self.exclude = method, include, exclude
        self.stored = {"quant_method": METHOD} | stored

    def to_dict(self) -> dict[str, Any]:
        """The manifest of the model (`ptqc.folders.manifest`)."""
        return dict(self.stored)


class PtqcQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts stored weights together while transformers loads, and takes them apart when it saves."""

    requires_calibration = False
    quantization_config: PtqcConfig

    def __init__(self, quantization_config: PtqcConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._weights: dict[str, StoredWeight] = {}
        self._tied: dict[str, str] = {}

    # ---------------------------------------------------------------- loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse offloading: accelerate takes a weight out of the model and cannot put a quantized one back."""
        if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
            offloaded = {"cpu", "disk"}.intersection(map(str, device_map.values()))
            if offloaded:
                raise PtqcError(f"device_map offloads to {' and '.join(offloaded)}; use devices that hold the weights")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        manifest = Manifest.from_config(self.quantization_config.stored, f"config.json of {model.name_or_path}")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        _check_files(manifest, checkpoint_files or [], parameters)
        remember(model, manifest.recipe)
        self._weights = _renamed(manifest.weights, parameters, model.base_model_prefix)
        self._tied = {a: b for a, b in manifest.tied.items() if a in parameters and b in parameters}
        for name, weight in self._weights.items():
            if weight.parameter_shape != parameters[name].shape:
                raise CheckpointError(
                    f"config.json of {model.name_or_path} stores {name} of shape {weight.parameter_shape}, but the "
                    f"architecture has {tuple(parameters[name].shape)}; its fields and quantization_config disagree"
                )
        own_ties = [f"^{re.escape(alias)}$" for alias in self._tied.keys() - model.all_tied_weights_keys.keys()]
        model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or []), *own_ties]

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight, so that device maps are planned with what a weight takes when it is quantized."""
        weight = self._weights.get(param_name)
        return param.element_size() if weight is None else weight.spec.nbytes(weight.shape) / param.numel()

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Only our own: tensors of a ptqc folder already have the names of the model's parameters."""
        if not self.pre_quantized:
            return weight_conversions
        # Here: transformers imports this module while it imports the quantizers.
        from transformers.core_model_loading import WeightConverter

        # The whole name is matched, since transformers replaces the first occurrence of what matched.
        layouts = (weight.layout(name) for name, weight in self._weights.items())
        stored = {part.rpartition(".")[2] for layout in layouts for part in layout}
        sources = [rf"^(.+)\.{part}$" for part in _PARTS if part in stored or not stored]
        return [WeightConverter(source_patterns=sources, target_patterns=[r"\1"], operations=[_Assemble(self)])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            _quantize(model, self.quantization_config)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for alias, name in self._tied.items():
            if parameters[alias] is not parameters[name]:
                module, _, attribute = alias.rpartition(".")
                setattr(model.get_submodule(module), attribute, parameters[name])
        lost = [name for name in self._weights if not isinstance(parameters[name], QuantTensor)]
        if lost:
            raise CheckpointError(f"{model.name_or_path} lacks {lost[0]} ({len(lost)} weights missing); save it again")
        _describe(model, self.quantization_config)
        return model

    def build(self, name: str, parts: Mapping[str, Tensor], model: Any) -> nn.Parameter:
        """The parameter called `name` of the model being loaded, from its parts."""
        weight = self._weights[name]
        wanted = weight.layout(name).keys() - {f"{name}.{part}" for part in parts}
        if wanted:
            raise CheckpointError(f"{model.name_or_path} lacks {min(wanted)}; save it again")
        dtype = model.get_parameter(name).dtype
        is_usual = str(dtype).removeprefix("torch.") == self.quantization_config.stored.get("dtype")
        pretended = weight.dtype if is_usual else planned_dtype(model, name, dtype)
        return nn.Parameter(weight.build(parts, pretended), requires_grad=False)

    # ---------------------------------------------------------------- saving

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The parts of every quantized weight under the names that `ptqc.save` gives them."""
        _describe(model, self.quantization_config)
        return parts_of(untied(model.state_dict())[0]), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """torch.compile works."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        plain: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for attribute, weight in list(module._parameters.items()):
                if isinstance(weight, QuantTensor):
                    if id(weight) not in plain:
                        plain[id(weight)] = nn.Parameter(weight.dequantize().to(wanted or weight.dtype))
                    setattr(module, attribute, plain[id(weight)])
        return model


class _Assemble:
    """The load operation (a `ConversionOps` of transformers): parts in, one parameter out."""

    supports_many_to_many = False

    def __init__(self, quantizer: PtqcQuantizer) -> None:
        self.hf_quantizer = quantizer  # its presence tells transformers not to cast the parts

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Assemble":
        return self  # transformers copies the converter for every weight

    def convert(self, input_dict: Mapping[str, Any], *, full_layer_name: str, model: Any, **_: Any) -> dict[str, Any]:
        """input_dict: for each source pattern the tensors it matched."""
        parts = {pattern.rpartition(".")[2].removesuffix("$"): tensors for pattern, tensors in input_dict.items()}
        single = {part: tensors[0] if isinstance(tensors, list) else tensors for part, tensors in parts.items()}
        return {full_layer_name: self.hf_quantizer.build(full_layer_name, single, model)}


def _check_files(manifest: Manifest, files: list[str], parameters: Container[str]) -> None:
    """Hold the headers of the files against the manifest, before transformers reads a tensor."""
    if not files:
        return
    folder = str(Path(files[0]).parent)
    pickles = [file for file in files if not file.endswith(".safetensors")]
    if pickles:
        raise CheckpointError(f"{pickles[0]} is no safetensors file; ptqc weights are only read from those")
    entries = {name: entry for file in files for name, entry in read_safefile(file).entries.items()}
    manifest.check({name: (entry.shape, entry.dtype) for name, entry in entries.items()}, folder)
    for name in entries.keys() - manifest.layout().keys():
        weight, _, part = name.rpartition(".")
        if part in _PARTS and weight in parameters and name not in parameters:
            raise CheckpointError(f"{folder} holds {name}, but quantization_config lacks {weight}; save it again")


def _renamed(weights: Mapping[str, StoredWeight], names: Iterable[str], prefix: str) -> dict[str, StoredWeight]:
    """Weights by the names of this model: a base model lacks the prefix that the model with a head has."""
    known = set(names)
    found = {}
    for name, weight in weights.items():
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        match = next((candidate for candidate in candidates if candidate in known), None)
        if match is not None:
            found[match] = weight
    return found


def _quantize(model: Any, config: PtqcConfig) -> None:
    if config.method is None:
        raise PtqcError("PtqcConfig names no method; for example PtqcConfig(method='hqq', bits=4)")
    rule = make_rule("*", config.method, **config.request)  # type: ignore[arg-type]
    sites, _ = select_sites(*find_sites(model), model, config.include, config.exclude)
    work, _ = assign(sites, [rule])
    if not work:
        raise PtqcError("nothing would be quantized; see include and exclude of PtqcConfig")
    for site, chosen in work:
        site.replace(quantize_site(site, chosen))
    remember(model, recipe_rows([rule]))
    log.info("quantized %d weights of %s while loading", len(work), model.name_or_path)


def _describe(model: Any, config: PtqcConfig) -> None:
    """Bring the config of the model up to date with the weights it holds."""
    config.stored = manifest_of(*untied(model.state_dict()), recipe_of(model)).to_config()
    model.config.quantization_config = config
    model._weight_conversions = []  # saved names are the model's own, not those of the checkpoint it came from


def attach(model: nn.Module) -> None:
    """Tell a transformers model, quantized in memory, how to save itself: `save_pretrained` works afterwards."""
    model.hf_quantizer = PtqcQuantizer(PtqcConfig(), pre_quantized=True)


# Importing this module registers it; `ptqc/__init__.py` imports it as soon as transformers' table exists.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, PtqcConfig)
auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, PtqcQuantizer)
