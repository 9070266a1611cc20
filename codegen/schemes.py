"""How compressed-tensors spells in JSON what is done to weights and inputs, and which weights a target means."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptqc.act_spec import ActSpec
from ptqc.errors import CheckpointError
from ptqc.spec import WeightSpec

__all__ = ["ActTargets", "act_form", "read_acts", "weight_form"]

_BITS = {"int8": (8, "int"), "fp8e4m3": (8, "float")}


def weight_form(spec: WeightSpec, has_order: bool) -> dict[str, Any]:
    """How a weight is quantized. has_order: its groups follow weight_g_idx."""
    form: dict[str, Any] = {
        "num_bits": spec.bits, "type": "int" if spec.codebook is None else "float", "symmetric": spec.is_symmetric,
        "strategy": _strategy(spec), "group_size": None if spec.is_block else spec.group, "dynamic": False,
        "actorder": "group" if has_order else None,
    }  # fmt: skip
    if spec.is_block:
        form["block_structure"] = [spec.rows, spec.group]
    if spec.scale.dtype == "e8m0":
        form |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return form


def _strategy(spec: WeightSpec) -> str:
    if spec.is_block:
        return "block"
    if spec.group is not None:
        return "group"
    return "tensor" if spec.rows is None else "channel"


def act_form(act: ActSpec) -> dict[str, Any] | None:
    """How an input is quantized; None if it is not."""
    if act.dtype is None:
        return None
    bits, kind = _BITS[act.dtype]
    return {
        "num_bits": bits, "type": kind, "symmetric": True, "strategy": act.scale, "group_size": None,
        "dynamic": not act.is_static,
    }  # fmt: skip


@dataclass(frozen=True)
class ActTargets:
    """What is done to the inputs of the modules that match. targets: names, regular expressions after "re:", or names
    of module classes, which every name matches here: only weights that are quantized are asked about."""

    act: ActSpec
    targets: tuple[str, ...]

    def has(self, module: str) -> bool:
        """Whether a module is meant."""
        return any(_matches(target, module) for target in self.targets)


_SIMPLE = re.compile(r"(?:[\w\-^$()|]|\\[.d]|\.[*+]?){1,200}")
_WILDCARDS = 4


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module or module.endswith(f".{target}") or (target.isidentifier() and target[:1].isupper())


def read_acts(groups: Sequence[Mapping[str, Any]], where: str) -> tuple[ActTargets, ...]:
    """What happens to inputs, from the entries of config_groups.

    Raises: CheckpointError for what cannot be done here, and for regular expressions that could take forever.
    """
    found = []
    for group in groups:
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(f"{where}: targets in config_groups must be a list of names; save it again")
        for pattern in (target[3:] for target in targets if target.startswith("re:")):
            _check_pattern(pattern, where)
        found.append(ActTargets(_read_act(group.get("input_activations"), where), tuple(targets)))
    by_name = sorted(found, key=lambda entry: any(target[:1].isupper() for target in entry.targets))
    return tuple(by_name)


def _check_pattern(pattern: str, where: str) -> None:
    """Patterns come from a file; those with nested repetitions take exponential time."""
    count = pattern.count("*") + pattern.count("+")
    try:
        is_simple = bool(_SIMPLE.fullmatch(pattern)) and count <= _WILDCARDS and not re.search(r"\)[*+]", pattern)
        re.compile(pattern if is_simple else "(")
    except re.error:
        raise CheckpointError(f"{where}: the target {pattern[:80]!r} is not read; name the modules instead") from None


def _read_act(form: object, where: str) -> ActSpec:
    if form is None:
        return ActSpec()
    if not isinstance(form, Mapping):
        raise CheckpointError(f"{where}: input_activations in config_groups is no table; save it again")
    given = (form.get("num_bits"), form.get("type", "int"))
    dtype = next((name for name, known in _BITS.items() if known == given), None)
    scale, is_dynamic = form.get("strategy"), form.get("dynamic", False)
    if dtype is None or scale not in ("token", "tensor") or is_dynamic not in (True, False):
        kind = f"{form.get('num_bits')} bits, {form.get('type')}, {scale}"
        raise CheckpointError(f"{where}: inputs quantized as {kind} are not known; known: int8 or fp8, token or tensor")
    if form.get("symmetric", True) is not True:
        raise CheckpointError(f"{where}: inputs with zero points are not known; quantize them symmetrically")
    if scale == "token" and not is_dynamic:
        raise CheckpointError(f"{where}: inputs with static scales per token are not known; use dynamic ones")
    return ActSpec(dtype=dtype, scale=scale, is_static=not is_dynamic)  # type: ignore[arg-type]
