"""Importance of channels: the mean square of what comes in, and what exporting makes of it."""

import pytest
import torch
from torch import nn

import ptqc
from ptqc.errors import ExportError, PtqcError
from tests.export._models import quantized, small_model
from tests.export.test_gguf_tokenizer import byte_level

SMALL = {"vocab_size": 700, "num_hidden_layers": 1}
IDS = torch.randint(2, 700, (3, 16), generator=torch.Generator().manual_seed(0))


def inputs_of(model, name):
    """What a module is given, [rows, in]."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(IDS, use_cache=False)
    handle.remove()
    return seen[0].flatten(0, -2)


def test_it_is_the_mean_square_of_the_inputs():
    model = small_model(**SMALL)
    found = ptqc.importance(model, [IDS])
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert found.keys() == {f"{name}.weight" for name in modules}
    for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "lm_head"):
        expected = inputs_of(model, name).square().mean(0)
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-4, atol=1e-6)


def test_a_model_without_float_matrices_is_an_error():
    model = quantized(nn.Sequential(nn.Linear(32, 32)), "int4g32")
    with pytest.raises(PtqcError, match=r"no float matrix"):
        ptqc.importance(model, [{"input": torch.ones(1, 32)}])


def test_exporting_with_calibration_data_lowers_the_error_that_counts(tmp_path):
    model, tokenizer = small_model(**SMALL), byte_level()
    counts = ptqc.importance(model, [IDS])
    errors = []
    for number, options in enumerate(({}, {"calibration": [IDS]}, {"importance": counts})):
        path = tmp_path / f"{number}.gguf"
        ptqc.export(model, "gguf", path, quant="Q4_0", pure=True, tokenizer=tokenizer, **options)
        loaded = dict(ptqc.load(path).named_parameters())
        left = {name: loaded[name].dequantize() - model.get_parameter(name) for name in counts}
        errors.append(sum(float((left[name].square() * counts[name]).sum()) for name in counts))
    assert errors[1] == pytest.approx(errors[2])
    assert errors[1] < 0.99 * errors[0]


def test_not_both():
    with pytest.raises(ExportError, match=r"not both"):
        ptqc.export(small_model(**SMALL), "gguf", "x.gguf", calibration=[IDS], importance={})


def test_a_format_without_importance_says_so(tmp_path):
    with pytest.raises(ExportError, match=r'"onnx" has no option .importance.'):
        ptqc.export(small_model(**SMALL), "onnx", tmp_path / "x.onnx", calibration=[IDS])
