"""The transformers architecture that a model folder asks for: its class, and the model without weights."""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptqc.errors import CheckpointError, PtqcError, first_line
from ptqc.folders.folder import ModelFolder

__all__ = ["architecture_of", "build_empty", "build_unfilled", "cannot_build", "held_to", "planned_dtype"]

_MOST_CODES = 32
"""Weights that one number in a file may stand for: a word of codes of one bit."""


def architecture_of(stored: ModelFolder, trust_remote_code: bool = False) -> Any:
    """The class with `from_pretrained` that config.json names.

    Raises: CheckpointError if it names none, one that transformers lacks, or code of its own that is not trusted.
    """
    import transformers  # here: plain modules need no transformers

    where, config = stored.path / "config.json", stored.config
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str) or "model_type" not in config:
        raise CheckpointError(f"{where} names no transformers architecture; load it into a skeleton (model=...)")
    if "auto_map" in config:
        if not trust_remote_code:
            raise CheckpointError(f"{where} brings its own model code; read it, then ask for trust_remote_code")
        own = config["auto_map"] if isinstance(config["auto_map"], dict) else {}
        keys = [key for key, value in own.items() if str(value).endswith(f".{names[0]}")]
        return getattr(transformers, keys[0] if keys else "AutoModelForCausalLM")
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        version = transformers.__version__
        raise CheckpointError(f"{where} asks for {names[0]}, which transformers {version} lacks; update transformers")
    return found


def build_empty(stored: ModelFolder, trust_remote_code: bool = False) -> Any:
    """The model that config.json describes, on the meta device: shapes and ties, no values.

    Raises: CheckpointError if transformers cannot build it.
    """
    with torch.device("meta"):
        return _built(stored, trust_remote_code)


def build_unfilled(stored: ModelFolder, trust_remote_code: bool = False) -> Any:
    """The same on the cpu, in float32 and evaluation mode: parameters are memory that nothing has touched yet.

    The operating system gives such memory no pages until it is written. Buffers that no checkpoint holds have their
    values, persistent ones have not.

    Raises: CheckpointError if transformers cannot build it.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = _built(stored, trust_remote_code, dtype=torch.float32)
    model.tie_weights()
    return model.eval()


def _built(stored: ModelFolder, trust_remote_code: bool, **options: Any) -> Any:
    architecture = architecture_of(stored, trust_remote_code)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(stored.path), trust_remote_code=trust_remote_code)
        config.__dict__.pop("quantization_config", None)  # the architecture alone: how it is stored is our business
        with held_to(stored):
            if hasattr(architecture, "_from_config"):
                return architecture._from_config(config, **options)
            return architecture.from_config(config, trust_remote_code=trust_remote_code, **options)
    except PtqcError:
        raise
    except Exception as error:  # the fields of a hostile config fail anywhere in transformers, in any way
        raise cannot_build(stored, error) from error


@contextmanager
def held_to(stored: ModelFolder) -> Iterator[None]:
    """While transformers builds the model of a folder: stop where config.json announces more than the tensors can fill.

    Raises: CheckpointError for more parameters than twice the tensors, or one larger than all of them.
    """
    most = 2 * len(stored.entries) + 100
    largest = _MOST_CODES * sum(math.prod(entry.shape) for entry in stored.entries.values())
    where, thread, seen = stored.path / "config.json", threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal seen
        if parameter is None or threading.get_ident() != thread:
            return
        seen += 1
        if seen > most:
            raise CheckpointError(
                f"{where} describes a model of more than {most} parameters, the folder has {len(stored.entries)} "
                "tensors; download or save it again"
            )
        if parameter.numel() > largest:
            raise CheckpointError(
                f"{where} describes a parameter {name} of shape {list(parameter.shape)}, which the tensors of the "
                "folder cannot fill; download or save it again"
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def planned_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which transformers loads a parameter of a model of `dtype`: some keep a few in float32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name)), dtype)


def cannot_build(stored: ModelFolder, error: Exception) -> CheckpointError:
    """What to tell when transformers fails on a folder."""
    reason = first_line(error)
    return CheckpointError(f"transformers cannot build the model of {stored.path / 'config.json'}: {reason}; repair it")
