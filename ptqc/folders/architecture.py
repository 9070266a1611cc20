"""The transformers architecture that a model folder asks for: its class, and the model without weights."""

import re
from typing import Any

import torch

from ptqc.errors import CheckpointError, first_line
from ptqc.folders.folder import ModelFolder

__all__ = ["architecture_of", "build_empty", "build_unfilled", "cannot_build", "planned_dtype"]


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
        if hasattr(architecture, "_from_config"):
            return architecture._from_config(config, **options)
        return architecture.from_config(config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # the fields of a hostile config fail anywhere in transformers, in any way
        raise cannot_build(stored, error) from error


def planned_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which transformers loads a parameter of a model of `dtype`: some keep a few in float32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name)), dtype)


def cannot_build(stored: ModelFolder, error: Exception) -> CheckpointError:
    """What to tell when transformers fails on a folder."""
    reason = first_line(error)
    return CheckpointError(f"transformers cannot build the model of {stored.path / 'config.json'}: {reason}; repair it")
