"""Every reader of files that others wrote: something sound for it, damage to that, and what it is asked."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from torch import nn

import ptqc
from ptqc.codegen.export._gguf_imatrix import read_imatrix, write_imatrix
from ptqc.codegen.export._gguf_parse import parse
from ptqc.codegen.exporters import export
from ptqc.folders.flatten import unflatten_state_dict
from ptqc.folders.safefile import read_safefile
from ptqc.qtensor import QuantTensor
from ptqc.recipe import load_recipe
from ptqc.surroundings import Surroundings
from ptqc.texts import read_any_documents
from tests.export._folders import act_order, rounded
from tests.export._gguf_files import finished, written
from tests.export._models import EXPERTS, small_model
from tests.export.test_gguf_tokenizer import byte_level
from tests.hostile.damage import NUMBERS, WORDS, damaged_bytes, damaged_json
from tests.hostile.safetensors import Folder, write_files
from tests.tiny import tiny

Attack = Callable[[Random], Callable[[], object]]
"""From random numbers to a damaged file, and from there to what reads it."""


@dataclass(frozen=True)
class Reader:
    """prepare: given a folder of its own, makes something sound and returns how to attack. is_slow: it builds a
    transformers model for every case."""

    prepare: Callable[[Path], Attack]
    is_slow: bool = False


def scratch() -> Path:
    """A new folder, in memory where there is such a place."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="ptqc-hostile-", dir=shared if shared.is_dir() else None))


# -------------------------------------------------------------------- model folders


def _modules() -> nn.ModuleDict:
    return nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64, bias=False), "norm": nn.LayerNorm(64)})


def _small(spec: str, has_order: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = _modules()
    for name in ("up", "down"):
        around, extras = Surroundings(), {}
        if has_order:
            around, extras = Surroundings(order=True), {"order": act_order(model[name].in_features)}
        model[name].weight = rounded(model[name].weight, spec, around, **extras)
    return model


def _folders(*kinds: tuple[str | None, str, bool]) -> Callable[[Path], Attack]:
    """Folders of a few modules, loaded into a skeleton. kinds: (format or None for our own, spec, with an order)."""

    def prepare(path: Path) -> Attack:
        sound = []
        for number, (form, spec, has_order) in enumerate(kinds):
            target = path / f"sound{number}"
            model = _small(spec, has_order)
            ptqc.export(model, form, target) if form else ptqc.save(model, target)
            sound.append(Folder.of(target))
        folder = path / "case"
        folder.mkdir()

        def attack(rng: Random) -> Callable[[], object]:
            write_files(folder, rng.choice(sound).damaged(rng, "quantization_config"))
            with torch.device("meta"):
                skeleton = _modules()

            def read() -> None:
                for weight in ptqc.load(folder, model=skeleton).parameters():
                    if isinstance(weight, QuantTensor):
                        assert weight.dequantize().shape == weight.shape

            return read

        return attack

    return prepare


def _models(form: str | None, spec: str, **options: Any) -> Callable[[Path], Attack]:
    """A folder that transformers builds a model from; options: of `ptqc.save`."""

    def prepare(path: Path) -> Attack:
        model = tiny("plain")
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = rounded(module.weight, spec)
        ptqc.export(model, form, path / "sound") if form else ptqc.save(model, path / "sound", **options)
        sound = Folder.of(path / "sound")
        folder = path / "case"
        folder.mkdir()

        def attack(rng: Random) -> Callable[[], object]:
            write_files(folder, sound.damaged(rng, "quantization_config" if rng.random() < 0.5 else None))
            return lambda: ptqc.load(folder)

        return attack

    return prepare


def _shards(path: Path) -> Attack:
    model = _small("int4g32z")
    ptqc.save(model, path / "sound", max_shard_bytes=6000)
    files = {file.name: file.read_bytes() for file in (path / "sound").iterdir()}
    index = "model.safetensors.index.json"
    folder = path / "case"

    def attack(rng: Random) -> Callable[[], object]:
        import json

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        broken = dict(files)
        if rng.random() < 0.7:
            fields = json.loads(files[index])
            for _ in range(rng.randint(1, 3)):
                damaged_json(rng, fields)
            broken[index] = json.dumps(fields).encode()
        else:
            name = rng.choice(sorted(broken))
            broken[name] = damaged_bytes(rng, broken[name], 500)
        if rng.random() < 0.2:
            del broken[rng.choice(sorted(broken))]
        write_files(folder, broken)
        with torch.device("meta"):
            skeleton = _modules()
        return lambda: ptqc.load(folder, model=skeleton)

    return attack


def _state_dict(path: Path) -> Attack:
    """A safetensors file with our manifest in its metadata: state dicts, and pieces of a run that was killed."""
    import json

    import safetensors.torch

    from ptqc.folders.flatten import flatten_state_dict

    tensors, metadata = flatten_state_dict(_small("int4g32z").state_dict())
    safetensors.torch.save_file(tensors, path / "s.safetensors", metadata)
    (path / "sound").mkdir()
    safetensors.torch.save_file(tensors, path / "sound" / "model.safetensors", metadata)
    sound = Folder.of(path / "sound")

    def attack(rng: Random) -> Callable[[], object]:
        files = sound.damaged(rng) if rng.random() < 0.7 else dict(sound.files)
        file = path / "case.safetensors"
        file.write_bytes(files["model.safetensors"])
        said = dict(metadata)
        if rng.random() < 0.6:
            config = json.loads(metadata["ptqc"])
            damaged_json(rng, config)
            said["ptqc"] = json.dumps(config)

        def read() -> None:
            found = read_safefile(file)
            unflatten_state_dict({name: entry.read() for name, entry in found.entries.items()}, said)

        return read

    return attack


# -------------------------------------------------------------------- GGUF


def _gguf_parser(path: Path) -> Attack:
    data = written(path / "sound.gguf")
    file = path / "case.gguf"

    def attack(rng: Random) -> Callable[[], object]:
        file.write_bytes(damaged_bytes(rng, data))

        def read() -> None:
            found = parse(file)
            for name, at in found.tensors.items():
                assert found.read(name).nbytes == at.nbytes

        return read

    return attack


def _gguf_model(path: Path) -> Attack:
    """Whole models: half of the cases change bytes, half write a sound file that says something else."""
    sounds = []
    kinds = (("Llama", "Q4_0"), ("Llama", "F32"), ("Mixtral", "Q4_0"), ("GPT2", "Q4_0"))
    for number, (family, quant) in enumerate(kinds):
        model = small_model(family, vocab_size=700, num_hidden_layers=1, **(EXPERTS if family == "Mixtral" else {}))
        export(model, "gguf", path / f"full{number}.gguf", quant=quant, tokenizer=byte_level())
        sounds.append(gguf.GGUFReader(path / f"full{number}.gguf"))
    file = path / "case.gguf"
    plain = [rewritten(reader, file) for reader in sounds]

    def attack(rng: Random) -> Callable[[], object]:
        at = rng.randrange(len(sounds))
        if rng.random() < 0.5:
            file.write_bytes(damaged_bytes(rng, plain[at], 2500))
        else:
            rewritten(sounds[at], file, rng)
        return lambda: ptqc.load(file)

    return attack


def rewritten(reader: gguf.GGUFReader, target: Path, rng: Random | None = None) -> bytes:
    """A copy without a tokenizer; rng: with other metadata and tensors, written as a sound file."""
    fields = {name: field for name, field in reader.fields.items() if not name.startswith(("GGUF.", "tokenizer."))}
    chosen = rng.sample(sorted(fields), rng.choice((0, 1, 1, 2))) if rng is not None else ()
    writer = gguf.GGUFWriter(target, fields["general.architecture"].contents())
    for name, field in fields.items():
        if name != "general.architecture":
            kind, content = field.types[0], field.contents()
            if rng is not None and name in chosen:
                kind, content = _other(rng, kind, content)
            if content is not None:
                writer.add_key_value(name, content, kind)
    tensors = list(reader.tensors)
    spoilt = rng.randrange(len(tensors)) if rng is not None and (not chosen or rng.random() < 0.5) else -1
    for number, tensor in enumerate(tensors):
        name, data, kind = tensor.name, tensor.data.copy(), tensor.tensor_type
        if rng is not None and number == spoilt:
            match rng.choice(("drop", "rename", "rows", "values", "columns", "type")):
                case "drop":
                    continue
                case "rename":
                    name = f"{name}x"
                case "rows":
                    data = data[: max(1, len(data) // 2)] if rng.random() < 0.5 else np.concatenate([data, data])
                case "values":
                    data = np.frombuffer(rng.randbytes(data.nbytes), data.dtype).reshape(data.shape)
                case "columns" if data.ndim == 2:
                    data = np.concatenate([data, data], axis=1)
                case _:
                    data = np.frombuffer(data.tobytes(), np.uint8).reshape(len(data), -1)
                    kind = gguf.GGMLQuantizationType.I8
        writer.add_tensor(name, data, raw_dtype=kind)
    return finished(writer, target)


def _other(rng: Random, kind: gguf.GGUFValueType, content: Any) -> tuple[gguf.GGUFValueType, Any]:
    """Another value of a key, or none, of its own type or another."""
    limits = {gguf.GGUFValueType.UINT32: 2**32, gguf.GGUFValueType.UINT64: 2**64}
    if rng.random() < 0.2:
        return kind, None
    if rng.random() < 0.2:
        return gguf.GGUFValueType.STRING, rng.choice([w for w in WORDS if w.isprintable()])
    if kind in limits:
        return kind, rng.choice([n for n in NUMBERS if isinstance(n, int) and 0 <= n < limits[kind]])
    if kind == gguf.GGUFValueType.FLOAT32:
        return kind, rng.choice([0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), 2.0])
    return gguf.GGUFValueType.FLOAT32, rng.choice([0.0, float("nan"), 3.0])


def _imatrix(suffix: str) -> Callable[[Path], Attack]:
    def prepare(path: Path) -> Attack:
        file = path / f"case.{suffix}"
        numbers = {"blk.0.attn_q.weight": np.arange(1, 65, dtype=np.float32), "output.weight": np.ones(16, np.float32)}
        write_imatrix(file, numbers, rows=7)
        data = file.read_bytes()

        def attack(rng: Random) -> Callable[[], object]:
            file.write_bytes(damaged_bytes(rng, data))
            return lambda: read_imatrix(file)

        return attack

    return prepare


# -------------------------------------------------------------------- texts of people


_RECIPES = (
    [{"pattern": "lm_head", "method": "none"},
     {"pattern": "*.mlp.*", "transforms": [{"name": "smoothquant", "alpha": 0.8}], "method": "gptq", "bits": 8,
      "activation": "int8-token"},
     {"pattern": "*", "method": "rtn", "bits": 4, "group_size": 128}],
    [{"pattern": "re:layers\\.[0-3]\\.", "method": "gptq", "spec": "int4g64z", "options": {"damp": 0.02}},
     {"pattern": ".*v_proj.*", "method": {"name": "hqq"}, "bits": 3, "group_size": -1},
     {"pattern": "q", "method": ["awq", {"name": "rtn", "symmetric": False}], "bits": 4},
     {"pattern": "*", "method": "quip-sharp"}],
)  # fmt: skip
_BOMBS = (
    "&a [*a]", "- &a {pattern: *a}", "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "- !!python/object/apply:os.system [ls]",
    "- {pattern: !!binary aGk=}", "- " * 3000 + "a", "[" * 3000, "- {? [a, b] : c}", "- {pattern: 2026-11-24}",
    "- <<: {pattern: a}\n  method: none", "- &r {pattern: a, method: none, options: *r}", "\t- a", "- {}\n---\n- {}",
    "- {pattern: a, bits: .nan}", "- {pattern: a, bits: 1" + "0" * 6000 + "}", "- {pattern: a, ? b}",
    "%YAML 9.9\n---\n- a",
    "- {pattern: &p a, method: *p}", "- {1: 2, [3]: 4}", "- {pattern: a, options: {1: 2}}", "- {pattern: 0o17}",
    "\n".join(["a0: &a0 [x,x,x,x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]),
    "- {pattern: a, options: &b [&c [x,x,x], *c, *c]}",
)  # fmt: skip


def _recipe(path: Path) -> Attack:
    file = path / "recipe.yaml"

    def attack(rng: Random) -> Callable[[], object]:
        rows: list[Any] = yaml.safe_load(yaml.safe_dump(rng.choice(_RECIPES)))
        draw = rng.random()
        if draw < 0.05:
            file.write_text(rng.choice(_BOMBS), encoding="utf-8")
        else:
            for _ in range(rng.choice((1, 1, 2, 3))):
                damaged_json(rng, rows)
            try:
                data = yaml.safe_dump(rows).encode("utf-8", "surrogatepass")
            except RecursionError:
                data = b"- {}"
            file.write_bytes(damaged_bytes(rng, data) if draw > 0.8 else data)
        return lambda: load_recipe(file)

    return attack


def _jsonl(path: Path) -> Attack:
    import json

    file = path / "texts.jsonl"
    rows = [{"text": "some words"}, {"messages": [{"role": "user", "content": "a"}]}, {"other": 1}]

    def attack(rng: Random) -> Callable[[], object]:
        chosen = json.loads(json.dumps(rng.choices(rows, k=3)))
        for _ in range(rng.randrange(3)):
            damaged_json(rng, chosen)
        data = b"\n".join(json.dumps(row).encode() for row in chosen)
        file.write_bytes(damaged_bytes(rng, data) if rng.random() < 0.5 else data)
        return lambda: read_any_documents(file)

    return attack


READERS: dict[str, Reader] = {
    "gguf": Reader(_gguf_parser),
    "gguf model": Reader(_gguf_model, is_slow=True),
    "gptq": Reader(_folders(("gptq", "int4g32z", False), ("gptq", "int3g32", False), ("gptq", "int4g32z", True))),
    "awq": Reader(_folders(("awq", "int4g32z", False), ("awq", "int4", False))),
    "compressed-tensors": Reader(
        _folders(*(("compressed-tensors", spec, False) for spec in ("int4g32z", "int8", "fp8e4m3", "mxfp4")))
    ),
    "bitsandbytes": Reader(_folders(("bitsandbytes", "nf4g32dq", False), ("bitsandbytes", "fp4g64", False))),
    "hqq": Reader(_folders(("hqq", "int3g32f", False), ("hqq", "int8g64", False))),
    "own": Reader(_folders((None, "int4g32z", True), (None, "nf4g64dq", False), (None, "int3g32", False))),
    "own model": Reader(_models(None, "int4g32z"), is_slow=True),
    "gptq model": Reader(_models("gptq", "int4g32z"), is_slow=True),
    "shards": Reader(_shards),
    "state dict": Reader(_state_dict),
    "imatrix.gguf": Reader(_imatrix("gguf")),
    "imatrix.dat": Reader(_imatrix("dat")),
    "recipe": Reader(_recipe),
    "jsonl": Reader(_jsonl),
}
