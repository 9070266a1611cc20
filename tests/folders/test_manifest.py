import json

import pytest
import torch

from ptqc.errors import CheckpointError
from ptqc.folders.manifest import Manifest, StoredWeight, manifest_of
from ptqc.methods import quantize_weight
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.spec import WeightSpec
from tests.surrounded import KINDS, surrounded

SPECS = ["int4g64", "int3g32z", "int4g32m", "nf4g64dq", "ternaryg64", "fp8e4m3", "int8t", "fp8e4m3b128x128", "q4_K"]


def weight(spec="int4g64", dtype=torch.float16, is_transposed=False):
    values = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    return quantize_weight(values, RoundToNearest(), WeightSpec.parse(spec), is_transposed=is_transposed)


def config(**changes):
    row = {"spec": "int4g64", "shape": [256, 512]} | changes
    return {"quant_method": "ptqc", "version": 1, "dtype": "float16", "weights": {"w": row}}


@pytest.mark.parametrize("spec", SPECS)
def test_a_manifest_survives_json_and_rebuilds_the_weight(spec):
    quantized = {"w": weight(spec), "v": weight(spec, torch.float32, is_transposed=True)}
    manifest = manifest_of(quantized | {"norm": torch.ones(3)}, {"head": "w"})
    again = Manifest.from_config(json.loads(json.dumps(manifest.to_config())), "here")
    assert again == manifest
    for name, stored in again.weights.items():
        parts = quantized[name].parts
        layout = {part.removeprefix(f"{name}."): tensor for part, tensor in stored.layout(name).items()}
        assert layout == {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()}
        rebuilt = stored.build(parts)
        assert rebuilt.shape == quantized[name].shape == stored.parameter_shape
        assert rebuilt.dtype == quantized[name].dtype
        assert torch.equal(rebuilt.dequantize(), quantized[name].dequantize())


def test_only_an_unusual_dtype_is_spelled_out():
    rows = manifest_of({"a": weight(), "b": weight(), "c": weight(dtype=torch.float32)}).to_config()["weights"]
    assert [row.get("dtype") for row in rows.values()] == [None, None, "float32"]


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (None, "quantized by None, not ptqc"),
        ("gptq", "quantized by 'gptq', not ptqc"),
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq', not ptqc"),
        (config() | {"version": 2}, "version 2 of the ptqc format, we know 1"),
        (config() | {"weights": ["w"]}, "must be tables"),
        (config() | {"tied": {"a": 1}}, "must map names to names"),
        (config() | {"weights": {"w": "int4g64"}}, "names no spec for w"),
        (config(spec="int4g6x"), "'int4g6x' is no weight spec"),
        (config(spec="int4g48"), "group 48 does not divide"),
        (config(shape=[512]), r"the shape \[512\]"),
        (config(shape=[-256, 512]), "the shape"),
        (config(shape=[256.0, 512]), "the shape"),
        (config(shape=[2**60, 512]), "the shape"),
        (config(dtype="int8"), "the dtype 'int8'"),
        (config(dtype=["float16"]), "the dtype"),
        (config(transposed="yes"), "the dtype|transposed"),
    ],
)
def test_hostile_manifests_are_refused_by_name(broken, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Manifest.from_config(broken, "x/config.json")
    assert "x/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_are_held_against_the_spec():
    manifest = Manifest({"w": StoredWeight(WeightSpec.parse("int4g64"), (256, 512), torch.float16)})
    good = dict(manifest.layout())
    manifest.check(good, "x")
    with pytest.raises(CheckpointError, match=r"x lacks w\.scale, a part of a weight in int4g64"):
        manifest.check({"w.codes": good["w.codes"]}, "x")
    with pytest.raises(CheckpointError, match=r"w\.scale is float16 \[256, 4\], but int4g64 .* float16 \[256, 8\]"):
        manifest.check(good | {"w.scale": ((256, 4), torch.float16)}, "x")
    with pytest.raises(CheckpointError, match=r"w\.codes is int8"):
        manifest.check(good | {"w.codes": ((256, 256), torch.int8)}, "x")


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_around_a_weight_survives(kind):
    _, quantized = surrounded(kind, (96, 64), dtype=torch.float16)
    manifest = manifest_of({"w": quantized})
    config = json.loads(json.dumps(manifest.to_config()))
    assert config["weights"]["w"]["around"] == quantized.surroundings.to_json()
    stored = Manifest.from_config(config, "here").weights["w"]
    assert stored == manifest.weights["w"]
    tensors = quantized.tensors
    assert stored.layout("w") == {f"w.{name}": (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert torch.equal(stored.build(tensors), quantized)


def test_nothing_around_a_weight_is_not_written():
    assert "around" not in manifest_of({"w": weight()}).to_config()["weights"]["w"]


@pytest.mark.parametrize(
    ("around", "complaint"),
    [
        (None, "are a table"),
        ([], "are a table"),
        ({"rotation": "had64"}, "called 'rotation'"),
        ({"order": "yes"}, "order around a weight cannot be 'yes'"),
        ({"input_rotation": "had256"}, "'had256' is no rotation of 512 channels"),
        ({"output_rotation": "hadr" + "9" * 1000}, "is no rotation of 256"),
        ({"act": "int8-token-static"}, "static scales need"),
    ],
)
def test_hostile_surroundings_are_refused_by_name(around, complaint):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Manifest.from_config(config(around=around), "x/config.json")
    assert "x/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hostile_extras_are_refused():
    _, quantized = surrounded("order", (96, 64))
    stored = StoredWeight.of(quantized)
    for order in (torch.zeros(64, dtype=torch.int32), torch.full((64,), 2**30, dtype=torch.int32)):
        with pytest.raises(CheckpointError, match="order must hold every input once"):
            stored.build(quantized.tensors | {"order": order})
    with pytest.raises(CheckpointError, match=r"x lacks w\.order"):
        Manifest({"w": stored}).check({k: v for k, v in stored.layout("w").items() if k != "w.order"}, "x")


def test_the_recipe_is_kept_and_checked():
    rows = ({"pattern": "*", "method": "rtn", "bits": 4},)
    config = Manifest({}, {}, rows).to_config()
    assert Manifest.from_config(config, "here").recipe == rows
    assert "recipe" not in Manifest().to_config()
    with pytest.raises(CheckpointError, match="recipe of quantization_config must be a list of tables"):
        Manifest.from_config(config | {"recipe": ["rtn"]}, "here")
