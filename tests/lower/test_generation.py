"""Generating with a static KV cache: the tokens of eager execution, few graphs, few kernels, a cache in its place."""

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.launches import launches, per_layer, quantized, static_cache
from ptqc import backend
from tests.lower._everything import everything  # noqa: F401

LENGTHS = (5, 9, 14)


def generate(model, tokens):
    """Greedy continuations of prompts of all lengths, one cache for all."""
    cache, told = static_cache(model, max(LENGTHS) + tokens), []
    seeded = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        cache.reset()
        prompt = torch.randint(2, 120, (1, length), generator=seeded)
        with torch.no_grad():
            told += model.generate(
                prompt, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0, disable_compile=True,
            ).tolist()  # fmt: skip
    return told


def compiled_tokens(model, tokens, **settings):
    """What the compiled model generates, and how many graphs that took."""
    torch._dynamo.reset()
    counters.clear()
    eager = model.forward
    model.forward = torch.compile(eager, backend="ptqc", dynamic=True, fullgraph=True, **settings)
    with torch._dynamo.config.patch(specialize_float=True):
        told = generate(model, tokens)
    model.forward = eager
    return told, counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("everything")
def test_two_graphs_serve_all_prompts(monkeypatch):
    monkeypatch.setattr(backend, "compile_fx", lambda module, inputs, config_patches=None: module)
    model = quantized(2, dtype=torch.float32)
    told, graphs = compiled_tokens(model, 8)
    assert told == generate(model, 8) and graphs <= 2
    requests = [str(chosen.request) for chosen in backend.chosen_kernels(model)]
    assert len(requests) == 8 and sum("rms_norm" in request for request in requests) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("everything")
def test_64_tokens_with_a_cache_that_stays_where_it_is(monkeypatch):
    static = []

    def compile_fx(module, inputs, **options):
        def inner(module, inputs, **options):
            static.append((options["static_input_idxs"], inputs))
            return torch._inductor.compile_fx.compile_fx_inner(module, inputs, **options)

        return torch._inductor.compile_fx.compile_fx(module, inputs, inner_compile=inner, **options)

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    model = quantized(1, dtype=torch.float32)
    with torch._inductor.config.patch(force_disable_caches=True):
        told, graphs = compiled_tokens(model, 64)
    assert told == generate(model, 64) and graphs <= 2
    for positions, inputs in static:
        caches = [i for i, value in enumerate(inputs) if tuple(getattr(value, "shape", ())) == (1, 2, 78, 32)]
        assert len(caches) == 2 and set(caches) <= set(positions)
    assert len(static) == graphs


@pytest.mark.slow
@pytest.mark.usefixtures("everything")
def test_a_decoder_layer_launches_few_kernels():
    counts = per_layer(1, 2, dtype=torch.bfloat16)
    assert counts["ptqc"] == 5 and counts["others"] == 0 and counts["kernels"] <= 9  # four products, one attention


def test_launches_are_read_from_code():
    code = """
cpp_fused_add_0 = async_compile.cpp_pybinding(['const float*'], r'''
extern "C"  void  kernel(const float* in_ptr0)
{
    {
        for (...) { }
    }
    {
    }
}
''')
class Runner:
    def call(self, args):
        cpp_fused_add_0(arg0_1, buf0)
        cpp_fused_add_0(buf0, buf0)
        buf1 = torch.ops.ptqc.k_12.default(buf0, [arg1_1], [], 64)
        # buffer buf1 (op: torch.ops.ptqc.k_12.default) is assumed to be not aligned
        extern_kernels.mm(buf1, arg2_1, out=buf2)
        buf3 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(buf2, buf2, buf2)
        triton_poi_fused_0.run(buf3, 64, stream=stream0)
"""
    found = launches(code, entered={"ptqc.k_12.default"})
    assert found == {"ptqc": 1, "entries": 1, "inductor": 3, "others": 2, "loops": 4}
