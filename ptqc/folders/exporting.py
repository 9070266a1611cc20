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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqc.codegen.dialect import DIALECTS, Dialect, Inventory
from ptqc.codegen.exporters import ExportedTensor, ExportReport
from ptqc.errors import ExportError
from ptqc.folders.checkpoint import write_folder
from ptqc.folders.conversion import OnProgress
from ptqc.folders.export_plan import NEAREST, Planned, check_packs, float_modules, plan_export, said
from ptqc.folders.folder import open_folder
from ptqc.folders.foreign import open_foreign
from ptqc.folders.origins import Origin
from ptqc.folders.safefile import Layout, layout_bytes
from ptqc.folders.shards import Append, Block
from ptqc.folders.staging import staged
from ptqc.methods import METHODS, quantize_weight
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec

__all__ = ["export_folder"]

log = logging.getLogger("ptqc")


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
    planned = plan_export(origin, dialect, spelled, quant is not None, spec)
    inventory = Inventory({name: entry.meta for name, entry in planned.items()}, float_modules(origin, planned))
    dialect = dialect.settled(inventory)
    config = dialect.config(inventory)
    if is_fused:
        check_packs(origin, planned)
    prints: dict[str, int] = {}
    known: dict[object, Layout] = {}
    blocks = [
        _block(planned[name], origin, dialect, prints, known) if name in planned else origin.plain(name)
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


# -------------------------------------------------------------------- writing


def _block(
    planned: Planned, origin: Origin, dialect: Dialect, prints: dict[str, int], known: dict[object, Layout]
) -> Block:
    name = planned.name
    stem = name.removesuffix("weight")
    tails = _layout(dialect, planned.meta, known)
    layout = {f"{stem}{tail}": stored for tail, stored in tails.items()}

    def produce(append: Append) -> None:
        weight = _made(origin.read(name), planned)
        prints[name] = _print(weight)
        for tail, tensor in dialect.write(weight).items():
            append(f"{stem}{tail}", tensor)

    return Block(name, layout, produce)


def _layout(dialect: Dialect, meta: QuantTensor, known: dict[object, Layout]) -> Layout:
    """Shapes and types of the tensors of a weight: those that the dialect makes of one without values.

    known: what was found before; weights of a model have few shapes, and finding out takes milliseconds.
    """
    kind = (meta.spec, meta.stored_shape, meta.dtype, meta.surroundings)
    if kind not in known:
        known[kind] = {tail: (tuple(tensor.shape), tensor.dtype) for tail, tensor in dialect.write(meta).items()}
    return known[kind]


@torch.no_grad()
def _made(weight: Tensor, planned: Planned) -> QuantTensor:
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
    made = quantize_weight(
        plain, method, meta.spec, name=planned.name, is_transposed=meta.is_transposed, surroundings=meta.surroundings,
        extras=extras,
    )  # fmt: skip
    if made.spec != meta.spec:
        raise ExportError(f'"{planned.name}": its scales need {made.spec}, {meta.spec} does not hold them')
    return made


def _print(weight: QuantTensor) -> int:
    """A checksum of the numbers [out, in] that a weight stands for, and of how its inputs are quantized."""
    numbers = weight.with_parts(weight.parts, dtype=torch.float32, is_transposed=False).dequantize().cpu()
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


def _entry(block: Block, planned: Planned | None, origin: Origin) -> ExportedTensor:
    stored_as = str(planned.meta.spec) if planned else str(origin.tensors[block.name].dtype).removeprefix("torch.")
    first = next(iter(block.layout))
    return ExportedTensor(
        block.name, first, stored_as, planned.fate if planned else "lossless", layout_bytes(block.layout)
    )


def _changes(planned: Mapping[str, Planned]) -> list[str]:
    kinds = Counter((p.was, said(p.meta), p.fate) for p in planned.values() if p.fate != "lossless")
    how = {"converted": "rounded to", "requantized": "decoded, and rounded anew to"}
    return [f"{count} weights in {was}: {how[fate]} {now}" for (was, now, fate), count in kinds.items()]
