"""Small quantized models exported as folders, and what is in those."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ptqc
from ptqc.methods import METHODS, quantize_weight
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings
from tests.tiny import tiny

UP = "model.layers.0.mlp.up_proj"


def rounded(weight: Tensor, spec: str, around: Surroundings | None = None, **extras: Tensor) -> nn.Parameter:
    """The weight rounded to `spec`, with what is around it."""
    parsed = WeightSpec.parse(spec)
    method = METHODS.get("rtn")(symmetric=parsed.is_symmetric)
    made = quantize_weight(weight, method, parsed, surroundings=around or Surroundings(), extras=extras)
    return nn.Parameter(made, requires_grad=False)


def quantized(spec: str, around: Surroundings | None = None, name: str = "plain", dtype=torch.float32, **extras):
    """A tiny model whose linears but the head are rounded to `spec`. extras: functions of the number of inputs."""
    model = tiny(name, dtype)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in path:
            given = {key: make(module.in_features) for key, make in extras.items()}
            module.weight = rounded(module.weight, spec, around, **given)
    return model


def with_experts(spec: str):
    """A tiny model with packed experts, rounded to `spec` (`ptqc.quantize` would run it to learn how they are used)."""
    model = quantized(spec, name="experts")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj, experts.down_proj = rounded(experts.gate_up_proj, spec), rounded(experts.down_proj, spec)
    return model


def act_order(inputs: int) -> Tensor:
    """Some order of the inputs."""
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(7)).int()


def ordered(spec: str):
    """A tiny model whose linears were quantized in an order of their own."""
    return quantized(spec, Surroundings(order=True), order=act_order)


def exported(model, format: str, folder: Path, **options) -> dict[str, Tensor]:
    """Export a model; the tensors of the folder."""
    ptqc.export(model, format, folder, **options)
    return tensors_in(folder)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def config_in(folder: Path) -> dict:
    """The `quantization_config` of a folder."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def matrix(inputs: int, outputs: int, spec: str) -> nn.Module:
    """A module of one weight called "up.weight"."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"up": nn.Linear(inputs, outputs, bias=False)})
    module["up"].weight = rounded(module["up"].weight, spec)
    return module
