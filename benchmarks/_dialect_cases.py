"""The cases of `dialects`: folders that we write for other programs, and folders that they make for us."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["READ", "WRITTEN", "Case"]


@dataclass(frozen=True)
class Case:
    """One folder. python: what the other side runs with. ours: the arguments of `ptqc.quantize` and `ptqc.export` for
    folders that we write; theirs: what their side is told for folders that they write; load: how they open it.
    because: why their arithmetic differs, where it does. steps: of inputs, where they round them otherwise. is_conv1d:
    with a small random GPT-2, whose weights are those of Conv1D, in the place of the reference model."""

    name: str
    format: str
    python: str
    load: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    because: str = ""
    steps: float = 0.0
    is_conv1d: bool = False


def _hf(dtype="float32", **more):
    return {"loader": "transformers", "dtype": dtype, **more}


def _gptq(bits=4):
    return _hf(config=["GPTQConfig", {"bits": bits, "backend": "gptq_torch"}])


_AWQ = _hf(config=["AwqConfig", {"bits": 4, "backend": "torch_awq"}])
_WHOLE = {"loader": "gptqmodel", "dtype": "float16", "backend": "TORCH"}
_IN_HALF = "the whole model in float16"
_HALF = "GPTQModel's PyTorch kernel has weights in float16"
_BF16 = "the kernel works in bfloat16"
_ASYM = _hf(config=["CompressedTensorsConfig", {"dequantize": True}])
_DEQUANTIZED = "the package decodes weights in float16"
_DYNAMIC = "the package simulates int8 inputs in steps of max / 127.5, ours are max / 127"
_TRAINING = _hf(in_training=True)
_CT, _BNB = "compressed-tensors", "bitsandbytes"


def _w(spec, method="rtn", **more):
    return {"method": method, "spec": spec, **more}


WRITTEN = [
    Case("gptq int4g128", "gptq", "gptqmodel", _gptq(), _w("int4g128"), because=_HALF),
    Case("gptq int4g128, default kernel", "gptq", "gptqmodel", _hf(), _w("int4g128"), because=_BF16),
    Case("gptq int4g128, GPTQModel.load", "gptq", "gptqmodel", _WHOLE, _w("int4g128"), because=_IN_HALF),
    Case("gptq int4g128z (v2)", "gptq", "gptqmodel", _gptq(), _w("int4g128z"), because=_HALF),
    Case("gptq int4g64 (v2)", "gptq", "gptqmodel", _gptq(), _w("int4g64"), {"version": "gptq_v2"}, because=_HALF),
    Case("gptq int4g128 act-order", "gptq", "gptqmodel", _gptq(), _w("int4g128", "gptq", act_order=True),
         because=_HALF),
    Case("gptq int4 whole rows", "gptq", "gptqmodel", _gptq(), _w("int4"), because=_HALF),
    Case("gptq int8g128", "gptq", "gptqmodel", _gptq(8), _w("int8g128"), because=_HALF),
    Case("gptq int3g128", "gptq", "gptqmodel", _gptq(3), _w("int3g128"), because=_HALF),
    Case("gptq int2g64z (v2)", "gptq", "gptqmodel", _gptq(2), _w("int2g64z"), because=_HALF),
    Case("awq int4g128z", "awq", "gptqmodel", _AWQ, _w("int4g128z"), because=_HALF),
    Case("awq int4g64", "awq", "gptqmodel", _AWQ, _w("int4g64"), because=_HALF),
    Case("ct int4g128", _CT, _CT, _hf(), _w("int4g128")),
    Case("ct int4 whole rows", _CT, _CT, _hf(), _w("int4")),
    Case("ct int3g128", _CT, _CT, _hf(), _w("int3g128")),
    Case("ct int8g128", _CT, _CT, _hf(), _w("int8g128")),
    Case("ct int4g128z", _CT, _CT, _ASYM, _w("int4g128z"), because=_DEQUANTIZED),
    Case("ct int8g128z", _CT, _CT, _ASYM, _w("int8g128z"), because=_DEQUANTIZED),
    Case("ct int8, inputs int8 per token", _CT, _CT, _hf(), _w("int8", activation="int8-token"),
         because=_DYNAMIC, steps=127.5),
    Case("ct int8, inputs int8 static", _CT, _CT, _hf(), _w("int8", activation="int8-tensor-static")),
    Case("ct fp8 per row, inputs fp8 per token", _CT, _CT, _hf(), _w("fp8e4m3", activation="fp8e4m3-token")),
    Case("ct fp8 per tensor, inputs fp8 static", _CT, _CT, _hf(), _w("fp8e4m3t", activation="fp8e4m3-tensor-static")),
    Case("ct fp8 blocks", _CT, _CT, _hf(), _w("fp8e4m3b128x128")),
    Case("ct mxfp4", _CT, _CT, _hf("bfloat16"), _w("mxfp4"), because="the whole model in bfloat16"),
    Case("bnb nf4g64", _BNB, _BNB, _TRAINING, _w("nf4g64", "nf4")),
    Case("bnb nf4g64, default kernel", _BNB, _BNB, _hf(), _w("nf4g64", "nf4"),
         because="where the processor has AVX512-BF16, the kernel works in bfloat16"),
    Case("bnb nf4g64dq", _BNB, _BNB, _TRAINING, _w("nf4g64dq", "nf4")),
    Case("bnb fp4g128", _BNB, _BNB, _TRAINING, _w("fp4g128", "fp4")),
    Case("bnb int8, inputs int8 with outliers", _BNB, _BNB, _hf(), {"method": "llm_int8"},
         because="inputs are rounded in float16, ours in float32"),
    Case("hqq int4g64f", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int4g64f", "hqq")),
    Case("hqq int3g64f", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int3g64f", "hqq")),
    Case("hqq int2g64z", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int2g64z")),
    Case("hqq int8g128", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"}, _w("int8g128")),
    Case("hqq int4g64f, transformers 4", "hqq", "transformers4", _hf(), _w("int4g64f", "hqq")),
    Case("hqq int2g64z, transformers 4", "hqq", "transformers4", _hf(), _w("int2g64z")),
    Case("Conv1D, gptq int4g128", "gptq", "gptqmodel", _WHOLE, _w("int4g128"), because=_IN_HALF, is_conv1d=True),
    Case("Conv1D, gptq int4g128 act-order", "gptq", "gptqmodel", _WHOLE, _w("int4g128", "gptq", act_order=True),
         because=_IN_HALF, is_conv1d=True),
    Case("Conv1D, awq int4g128z", "awq", "gptqmodel", _WHOLE | {"backend": "AWQ_TORCH"}, _w("int4g128z"),
         because=_IN_HALF, is_conv1d=True),
    Case("Conv1D, bnb nf4g64", _BNB, _BNB, _TRAINING, _w("nf4g64", "nf4"), is_conv1d=True),
]  # fmt: skip


def _made(maker, **fields):
    return {"maker": maker, "fields": fields}


def _int(bits, group, symmetric=True):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


READ = [
    Case("GPTQModel 4 bits", "gptq", "gptqmodel", _gptq(), theirs=_made("gptqmodel", bits=4, group_size=128),
         because=_HALF),
    Case("GPTQModel 4 bits, zero points (v1)", "gptq", "gptqmodel", _gptq(),
         theirs=_made("gptqmodel", bits=4, group_size=128, sym=False), because=_HALF),
    Case("GPTQModel 4 bits, zero points (v2)", "gptq", "gptqmodel", _gptq(),
         theirs=_made("gptqmodel", bits=4, group_size=128, sym=False, format="gptq_v2"), because=_HALF),
    Case("GPTQModel 4 bits, act-order", "gptq", "gptqmodel", _gptq(),
         theirs=_made("gptqmodel", bits=4, group_size=128, desc_act=True, act_group_aware=False), because=_HALF),
    Case("GPTQModel 8 bits", "gptq", "gptqmodel", _gptq(8), theirs=_made("gptqmodel", bits=8, group_size=128),
         because=_HALF),
    Case("GPTQModel 3 bits", "gptq", "gptqmodel", _gptq(3), theirs=_made("gptqmodel", bits=3, group_size=128),
         because=_HALF),
    Case("GPTQModel 2 bits", "gptq", "gptqmodel", _gptq(2), theirs=_made("gptqmodel", bits=2, group_size=64),
         because=_HALF),
    Case("GPTQModel AWQ", "awq", "gptqmodel", _AWQ, theirs=_made("gptqmodel", bits=4, group_size=128, is_awq=True),
         because=_HALF),
    Case("llm-compressor W4A16 (GPTQ)", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="gptq", scheme="W4A16")),
    Case("llm-compressor W4A16 with zero points", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", scheme="W4A16_ASYM")),
    Case("llm-compressor 3 bits", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", **_int(3, 128))),
    Case("llm-compressor W8A8", _CT, "llmcompressor", _hf(), theirs=_made("llmcompressor", kind="rtn", scheme="W8A8"),
         because=_DYNAMIC, steps=127.5),
    Case("llm-compressor FP8_DYNAMIC", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", scheme="FP8_DYNAMIC")),
    Case("llm-compressor FP8 (static)", _CT, "llmcompressor", _hf(),
         theirs=_made("llmcompressor", kind="rtn", scheme="FP8")),
    Case("bitsandbytes nf4", _BNB, _BNB, _TRAINING,
         theirs=_made("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    Case("bitsandbytes nf4, nested", _BNB, _BNB, _TRAINING,
         theirs=_made("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    Case("bitsandbytes fp4", _BNB, _BNB, _TRAINING,
         theirs=_made("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    Case("bitsandbytes int8", _BNB, _BNB, _hf(), theirs=_made("bitsandbytes", load_in_8bit=True),
         because="inputs are rounded in float16, ours in float32"),
    Case("hqq 4 bits", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"},
         theirs=_made("hqq", nbits=4, group_size=64, axis=1)),
    Case("hqq 3 bits", "hqq", "hqq", {"loader": "hqq", "dtype": "float32"},
         theirs=_made("hqq", nbits=3, group_size=64, axis=1)),
    Case("Conv1D, GPTQModel 4 bits, act-order", "gptq", "gptqmodel", _WHOLE, because=_IN_HALF, is_conv1d=True,
         theirs=_made("gptqmodel", bits=4, group_size=128, desc_act=True, act_group_aware=False)),
    Case("Conv1D, bitsandbytes nf4", _BNB, _BNB, _TRAINING, is_conv1d=True,
         theirs=_made("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
]  # fmt: skip
