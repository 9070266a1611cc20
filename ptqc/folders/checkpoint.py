"""Saving a quantized model as a Hugging Face folder, and loading it: the same bits, tied weights tied.

The folder holds what `save_pretrained` would write, except that a quantized weight is stored as its parts and that
config.json says so (`ptqc.folders.manifest`). Tensors have the names of the model's own parameters.
"""

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqc.errors import CheckpointError, PtqcError
from ptqc.folders.architecture import architecture_of, cannot_build, held_to
from ptqc.folders.flatten import parts_of, untied
from ptqc.folders.folder import ModelFolder, copy_companions, open_folder
from ptqc.folders.foreign import fill_foreign, load_foreign, open_foreign
from ptqc.folders.gguf import is_gguf, load_gguf
from ptqc.folders.manifest import METHOD, Manifest, manifest_of
from ptqc.folders.shards import Append, Block, assign_shards, write_shards, written_bytes
from ptqc.folders.skeleton import fill_skeleton
from ptqc.folders.staging import require_space, staged
from ptqc.qtensor import QuantTensor
from ptqc.recipe import recipe_of, remember

__all__ = ["load", "manifest_in", "save", "write_folder", "write_model_files"]


# -------------------------------------------------------------------- saving


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Write a model as a folder that `ptqc.load` and, for transformers models, `from_pretrained` read.

    tokenizer: an object with `save_pretrained`; by default the files of the folder the model was loaded from are
    copied. The folder appears whole or not at all. overwrite: a model folder that is already there is replaced.

    Raises: CheckpointError if the model holds what no safetensors file can, or the folder cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    _refuse_foreign(model)
    kept, tied = untied(model.state_dict(keep_vars=True))
    manifest = manifest_of(kept, tied, recipe_of(model))
    blocks = [_block(name, tensor) for name, tensor in kept.items()]
    with staged(folder, overwrite=overwrite) as staging:
        write_folder(staging, blocks, max_shard_bytes, Path(folder))
        is_float = not manifest.weights and hasattr(getattr(model, "config", None), "save_pretrained")
        quantization = None if is_float else manifest.to_config()
        write_model_files(model, quantization, tied, staging, tokenizer)


def _refuse_foreign(model: nn.Module) -> None:
    quantizer = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(quantizer, "quant_method", METHOD)
    if method != METHOD:
        raise CheckpointError(f"the model is quantized by {method}, not ptqc; save it with its own save_pretrained")


def _block(name: str, tensor: Tensor) -> Block:
    if isinstance(tensor, QuantTensor):
        layout = {f"{name}.{part}": kind for part, kind in tensor.stored_layout.items()}
    else:
        layout = {name: (tuple(tensor.shape), tensor.dtype)}

    def produce(append: Append) -> None:
        for part, value in parts_of({name: tensor}).items():
            append(part, value)

    return Block(name, layout, produce)


def write_folder(
    staging: Path,
    blocks: list[Block],
    max_shard_bytes: float,
    target: Path,
    on_block: Callable[[Block], None] = lambda block: None,
) -> int:
    """Write the tensors of a checkpoint into `staging`, which will become `target`. Returns their bytes.

    Raises: CheckpointError if the disk cannot hold them.
    """
    shards = assign_shards(blocks, max_shard_bytes)
    needed = written_bytes(shards)
    require_space(target, needed)
    write_shards(staging, shards, on_block)
    return needed


def write_model_files(
    model: nn.Module, quantization: Mapping[str, Any] | None, tied: Mapping[str, str], staging: Path, tokenizer: Any
) -> None:
    """Write what a folder holds beside tensors: config, tokenizer, generation defaults.

    quantization: the `quantization_config`. tied: names of tied parameters with the name that is stored.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        text = json.dumps({"quantization_config": quantization}, indent=2)
        (staging / "config.json").write_text(text + "\n", encoding="utf-8")
        return
    origin = Path(str(getattr(config, "_name_or_path", None) or "/nowhere"))
    if origin.is_dir():
        copy_companions(origin, staging, with_code=hasattr(config, "auto_map"))
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    _saved_config(model, quantization, tied).save_pretrained(staging)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # Not its save_pretrained: that refuses settings of published models that it merely finds odd.
        (staging / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")


def _saved_config(model: Any, quantization: Mapping[str, Any] | None, tied: Mapping[str, str]) -> Any:
    """The config of a transformers model, told about the quantized weights and the ties that hold."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _float_dtype(model)
    config.__dict__.pop("quantization_config", None)
    if quantization is not None:
        config.quantization_config = dict(quantization)
    expected = getattr(model, "all_tied_weights_keys", {})
    if any(tied.get(alias, alias) != tied.get(name, name) for alias, name in expected.items()):
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    return config


def _float_dtype(model: nn.Module) -> str:
    """The commonest dtype of the parameters, what from_pretrained shall build the model in."""
    floats = [weight.dtype for weight in model.parameters() if weight.is_floating_point()]
    counts = Counter(dtype for dtype in floats if dtype.itemsize > 1)
    return str(counts.most_common(1)[0][0] if counts else torch.get_default_dtype()).removeprefix("torch.")


# -------------------------------------------------------------------- loading


def load(
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load what `save` wrote (or the hub repository "organisation/name"), what other programs quantized in one of the
    dialects of `ptqc.codegen.dialects` (gptq, awq, bitsandbytes, hqq, compressed-tensors), or a GGUF file.

    model: a skeleton to fill, needed for anything but a transformers model. dtype: what floating-point tensors become
    and quantized weights pretend to be; by default everything has the dtype it was saved with. Parts of quantized
    weights are never cast. trust_remote_code: run model code that the folder brings along.

    Raises: CheckpointError that names the file at fault and what would work.
    """
    if is_gguf(Path(folder)):
        return load_gguf(Path(folder), dtype).to(device)
    stored = open_folder(folder)
    foreign = open_foreign(stored)
    if foreign is not None:
        filled = fill_foreign(model, stored, foreign, dtype) if model is not None else None
        return (filled or load_foreign(stored, foreign, dtype, trust_remote_code)).to(device)
    manifest = manifest_in(stored)
    if model is None:
        return _built(stored, dtype, trust_remote_code).to(device)
    remember(model, manifest.recipe)
    return fill_skeleton(model, stored, manifest, dtype).to(device)


def manifest_in(stored: ModelFolder) -> Manifest:
    """The manifest of a folder, held against its tensors; an empty one for a float model.

    Raises: CheckpointError if they disagree, or the model is quantized by something else.
    """
    where = str(stored.path / "config.json")
    if "quantization_config" not in stored.config:
        return Manifest()
    manifest = Manifest.from_config(stored.config["quantization_config"], where)
    manifest.check(stored.layout, where)
    return manifest


def _built(stored: ModelFolder, dtype: torch.dtype | None, trust_remote_code: bool) -> nn.Module:
    """Let transformers build the model; its quantizer is ours (`ptqc.folders.hf`)."""
    architecture = architecture_of(stored, trust_remote_code)
    options = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code, "output_loading_info": True}
    try:
        with held_to(stored):
            model, report = architecture.from_pretrained(str(stored.path), **options)
    except PtqcError:
        raise
    except Exception as error:  # the fields of a hostile config fail anywhere in transformers, in any way
        raise cannot_build(stored, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{stored.path} lacks {missing[0]} ({len(missing)} missing); download or save it again")
    if dtype is None:
        _restore_dtypes(model, stored)
    loaded: nn.Module = model
    return loaded


def _restore_dtypes(model: nn.Module, stored: ModelFolder) -> None:
    """transformers casts every float tensor to one dtype; give back those that were saved with another."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        entry = stored.entries.get(name)
        if entry is not None and entry.dtype != tensor.dtype and not isinstance(tensor, QuantTensor):
            tensor.data = entry.read().to(tensor.device)
