"""Writing a model as a folder in the dialect of another program.

1. every weight is asked about before a byte is written: kept as it is, or stored anew where that was allowed, or the
   whole export is refused with the reasons;
2. weights that serving engines merge must agree;
3. the folder is written under another name, one weight at a time, read back and compared, and renamed.
"""

import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptqc.act_spec import ActSpec
from ptqc.codegen.dialect import DIALECTS, Dialect, Inventory, described, stem_of
from ptqc.codegen.exporters import ExportedTensor, ExportReport, Fate
from ptqc.codegen.serving import disagreements, kind_of
from ptqc.errors import ExportError, SpecError
from ptqc.folders.checkpoint import write_folder
from ptqc.folders.conversion import OnProgress
from ptqc.folders.folder import open_folder
from ptqc.folders.foreign import open_foreign
from ptqc.folders.origins import Origin
from ptqc.folders.safefile import layout_bytes
from ptqc.folders.shards import Append, Block
from ptqc.folders.staging import staged
from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.sites import find_sites
from ptqc.spec import WeightSpec
from ptqc.surroundings import Surroundings

__all__ = ["NEAREST", "export_folder"]

log = logging.getLogger("ptqc")

NEAREST = "nearest"
"""The request to store what a dialect cannot hold in the nearest spec that it can."""


@dataclass(frozen=True)
class _Planned:
    """A weight to write. meta: as it will be stored. fate: what happens to it. was: how it is stored now."""

    name: str
    meta: QuantTensor
    fate: Fate
    was: str


def export_folder(
    origin: Origin,
    format: str,
    path: Path,
    *,
    quant: str | None = None,
    tokenizer: Any = None,
    is_fused: bool = True,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total, name: None,
    **options: Any,
) -> ExportReport:
    """Write a model as a folder in a dialect.

    quant: None keeps every code as it is and refuses what the dialect cannot hold; "nearest" stores that anew in the
    nearest spec; a spec ("int4g128") stores it anew as that, and float weights of linears with it. is_fused: hold
    weights that serving engines merge against each other. on_progress: called with the bytes that are written, the
    bytes there will be, and the tensor just finished. options: of the dialect.

    Raises: ExportError naming the weights that the dialect refuses; CheckpointError if the folder cannot be written.
    """
    dialect, spelled = DIALECTS.get(format)(**options), format.replace("_", "-")
    spec = WeightSpec.parse(quant) if quant not in (None, NEAREST) else None
    planned = _plan(origin, dialect, spelled, quant is not None, spec)
    inventory = Inventory({name: entry.meta for name, entry in planned.items()}, _float_modules(origin, planned))
    dialect = dialect.settled(inventory)
    config = dialect.config(inventory)
    if is_fused:
        _check_packs(origin, planned)
    prints: dict[str, int] = {}
    blocks = [
        _block(planned[name], origin, dialect, prints) if name in planned else origin.plain(name)
        for name in origin.tensors
    ]
    with staged(path, overwrite=overwrite) as staging:
        write_folder(staging, blocks, max_shard_bytes, path, _counted(blocks, on_progress))
        origin.write_files(staging, config, tokenizer)
        _spell_for_older_readers(staging / "config.json")
        _read_back(staging, prints)
        nbytes = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    tensors = tuple(_entry(block, planned.get(block.name), origin) for block in blocks)
    report = ExportReport(path, spelled, nbytes, tensors, (*_changes(planned), *dialect.notes(inventory)))
    log.info("%s", report)
    return report


def _counted(blocks: Sequence[Block], on_progress: OnProgress) -> Callable[[Block], None]:
    total, done = sum(layout_bytes(block.layout) for block in blocks), 0

    def on_block(block: Block) -> None:
        nonlocal done
        done += layout_bytes(block.layout)
        on_progress(done, total, block.name)

    return on_block


# -------------------------------------------------------------------- planning


def _plan(
    origin: Origin, dialect: Dialect, format: str, may_change: bool, spec: WeightSpec | None
) -> dict[str, _Planned]:
    modules = dict(origin.modules.named_modules())
    planned, refused = {}, []
    for name, weight in origin.tensors.items():
        if not isinstance(weight, QuantTensor):
            continue
        misplaced = _misplaced(name, origin.source[name], modules)
        reason = misplaced or dialect.refuses(weight)
        if reason is None:
            planned[name] = _Planned(name, weight, "lossless", str(weight.spec))
            continue
        anew = None if misplaced else _anew(dialect, weight, spec)
        if may_change and anew is not None:
            planned[name] = _Planned(name, anew, "requantized", _said(weight))
        else:
            advice = "" if anew is None else f'; nearest is {_said(anew)} (quant="{NEAREST}" stores it so)'
            refused.append(f'"{name}": {reason}{advice}')
    if spec is not None:
        planned |= _planned_floats(origin, dialect, spec, refused)
    if refused:
        more = f" (and {len(refused) - 3} more weights)" if len(refused) > 3 else ""
        raise ExportError(f"{format} cannot hold this model: {'; '.join(refused[:3])}{more}")
    if not planned:
        raise ExportError(f'no weight is quantized; quantize the model first, or say how: quant="{_example(format)}"')
    return {name: planned[name] for name in origin.tensors if name in planned}


def _planned_floats(origin: Origin, dialect: Dialect, spec: WeightSpec, refused: list[str]) -> dict[str, _Planned]:
    """What is planned for float weights of linears; appends to the reasons."""
    planned, names = {}, _by_source(origin)
    for site in find_sites(origin.modules)[0]:
        if site.name not in names:
            refused.append(f'"{site.name}": the folder has no tensor of this name; load the model and export that')
        for name in names.get(site.name, ()):
            weight = origin.tensors[name]
            if isinstance(weight, QuantTensor):
                continue
            meta = _fitting(dialect, described(spec.fit(weight.shape), weight.shape, weight.dtype), (ActSpec(),))
            reason = "it is stored [in, out], which has no place there" if site.is_transposed else dialect.refuses(meta)
            if reason is None:
                planned[name] = _Planned(name, meta, "converted", str(weight.dtype).removeprefix("torch."))
            else:
                refused.append(f'"{name}": {reason}')
    return planned


def _misplaced(name: str, source: str, modules: Mapping[str, nn.Module]) -> str | None:
    if stem_of(name) is None:
        return "it is no weight of a module, and the tensors of others have no name there; leave it in float"
    owner = modules.get(source.removesuffix("weight").removesuffix("."))
    is_other = isinstance(owner, nn.Embedding)
    return "it is an embedding, which no reader looks for in stored form; leave it in float" if is_other else None


def _anew(dialect: Dialect, weight: QuantTensor, spec: WeightSpec | None) -> QuantTensor | None:
    """The weight as the dialect can hold it, None if it cannot."""
    if weight.ndim != 2 or weight.is_transposed:
        return None
    nearest, act = dialect.nearest(weight)
    kept = weight.surroundings.act
    chosen = nearest if spec is None else spec.fit(weight.stored_shape)
    try:
        made = _fitting(dialect, described(chosen, weight.stored_shape, weight.dtype), (kept, act, ActSpec()))
    except SpecError:
        return None
    return made if dialect.refuses(made) is None else None


def _fitting(dialect: Dialect, meta: QuantTensor, acts: tuple[ActSpec, ...]) -> QuantTensor:
    """The described weight with the first of these treatments of inputs that the dialect takes, or what it needs."""
    for act in (*acts, dialect.nearest(meta)[1]):
        made = described(meta.spec, meta.stored_shape, meta.dtype, Surroundings(act=act))
        if dialect.refuses(made) is None:
            return made
    return meta


def _float_modules(origin: Origin, planned: Mapping[str, _Planned]) -> list[str]:
    """Modules of matrices that stay in floating point: linears, also tied ones, and routers; but not embeddings."""
    kinds = {f"{name}.weight": type(module) for name, module in origin.modules.named_modules()}
    linears = [name for name, kind in kinds.items() if issubclass(kind, nn.Linear)]
    floats = [
        name
        for name, source in origin.source.items()
        if name not in planned
        and name.endswith(".weight")
        and origin.tensors[name].ndim == 2
        and not issubclass(kinds.get(source, nn.Linear), nn.Embedding)
    ]
    tied = set(linears).difference(origin.source.values())
    return [name.removesuffix(".weight") for name in (*floats, *sorted(tied))]


def _by_source(origin: Origin) -> dict[str, list[str]]:
    """The names in a folder of each parameter."""
    names: dict[str, list[str]] = {}
    for name, source in origin.source.items():
        names.setdefault(source, []).append(name)
    return names


def _check_packs(origin: Origin, planned: Mapping[str, _Planned]) -> None:
    kinds = {
        name: kind_of(planned[name].meta if name in planned else tensor, _order(origin, planned.get(name)))
        for name, tensor in origin.tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }
    wrong = disagreements(kinds)
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise ExportError(
            "serving engines store these as one matrix, so they must be quantized alike: "
            f"{'; '.join(wrong[:2])}{more}; "
            "give them one rule in the recipe, or pass is_fused=False for readers that do not merge them"
        )


def _order(origin: Origin, planned: _Planned | None) -> Tensor | None:
    has_order = planned is not None and planned.fate == "lossless" and planned.meta.surroundings.order
    return origin.order(planned.name) if planned is not None and has_order else None


# -------------------------------------------------------------------- writing


def _block(planned: _Planned, origin: Origin, dialect: Dialect, prints: dict[str, int]) -> Block:
    name = planned.name
    stem = name.removesuffix("weight")
    layout = {f"{stem}{tail}": (tuple(t.shape), t.dtype) for tail, t in dialect.write(planned.meta).items()}

    def produce(append: Append) -> None:
        weight = _made(origin.read(name), planned)
        prints[name] = _print(weight)
        for tail, tensor in dialect.write(weight).items():
            append(f"{stem}{tail}", tensor)

    return Block(name, layout, produce)


@torch.no_grad()
def _made(weight: Tensor, planned: _Planned) -> QuantTensor:
    """The weight as it is written, from the one there is."""
    if planned.fate == "lossless" and isinstance(weight, QuantTensor):
        return weight
    meta = planned.meta
    extras = {}
    if meta.surroundings.act.is_static:
        assert isinstance(weight, QuantTensor)
        extras["act_scale"] = weight.extras["act_scale"]
    plain = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    method = METHODS.get("rtn")()
    made = quantize_weight(plain, method, meta.spec, name=planned.name, surroundings=meta.surroundings, extras=extras)
    if made.spec != meta.spec:
        raise ExportError(f'"{planned.name}": its scales need {made.spec}, {meta.spec} does not hold them')
    return made


def _print(weight: QuantTensor) -> int:
    """A checksum of the numbers that a weight stands for, and of how its inputs are quantized."""
    numbers = weight.with_parts(weight.parts, dtype=torch.float32).dequantize().cpu()
    given = [numbers, *(weight.extras[name].cpu() for name in ("act_scale",) if name in weight.extras)]
    code = zlib.crc32(str(weight.surroundings.act).encode())
    for tensor in given:
        code = zlib.crc32((tensor + 0.0).contiguous().numpy().data, code)  # + 0.0: no negative zeros
    return code


def _read_back(staging: Path, prints: Mapping[str, int]) -> None:
    """Open what was written as `ptqc.load` would. Raises: ExportError if it says anything else."""
    foreign = open_foreign(open_folder(staging))
    found = {} if foreign is None else {name: _print(foreign.read(name)) for name in foreign.weights}
    wrong = [name for name in {**prints, **found} if prints.get(name) != found.get(name)]
    if wrong:
        raise ExportError(f'"{wrong[0]}" reads back as something else ({len(wrong)} weights); this is a bug in ptqc')


def _spell_for_older_readers(path: Path) -> None:
    """transformers 5 renamed fields that older readers and converters look for: have both names."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    if isinstance(rope, dict) and isinstance(rope.get("rope_theta"), (int, float)):
        config.setdefault("rope_theta", rope["rope_theta"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -------------------------------------------------------------------- reporting


def _said(weight: QuantTensor) -> str:
    act = weight.surroundings.act
    return str(weight.spec) if act.dtype is None else f"{weight.spec} with inputs in {act}"


def _entry(block: Block, planned: _Planned | None, origin: Origin) -> ExportedTensor:
    stored_as = str(planned.meta.spec) if planned else str(origin.tensors[block.name].dtype).removeprefix("torch.")
    first = next(iter(block.layout))
    return ExportedTensor(
        block.name, first, stored_as, planned.fate if planned else "lossless", layout_bytes(block.layout)
    )


def _changes(planned: Mapping[str, _Planned]) -> list[str]:
    kinds = Counter((p.was, _said(p.meta), p.fate) for p in planned.values() if p.fate != "lossless")
    how = {"converted": "rounded to", "requantized": "decoded, and rounded anew to"}
    return [f"{count} weights in {was}: {how[fate]} {now}" for (was, now, fate), count in kinds.items()]


def _example(format: str) -> str:
    return {"bitsandbytes": "nf4g64", "awq": "int4g128z", "hqq": "int4g64f"}.get(format, "int4g128")
