"""How fast does a Llama of about a billion parameters decode on this CPU, compiled by ptqc and by its peers?

16 layers, width 2048, 8192 inside the MLP, random weights; batch 1, a prompt of 128 tokens, then 128 tokens one by one.
ptqc: `torch.compile(backend="ptqc")` on weights stored in 4 bits; bfloat16: `torch.compile` on the float model; both
with a static cache and two graphs. llama.cpp (package llama-cpp-python, left out without it): the same 4-bit weights in
a GGUF file as Q4_0, and the float ones as Q4_K_M, with the vocabulary of the reference model and nothing behind it. The
output head is stored in 4 bits too (6 in Q4_K_M).

    python -m benchmarks.cpu_decode [--quick] [--threads 1] [--formats int4g32 nf4 gptq] [--layers 16] [--json FILE]

--formats names what the weights are stored in (FORMATS below). Calibrated ones see two windows of random tokens: their
weights are not good, but as slow or fast as good ones. --experts: a mixture of so many experts instead (Qwen3-MoE), 768
wide inside, four of them for each token. Beside the JSON a plot is drawn (if matplotlib is installed).
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers

import ptqc
from benchmarks import reference
from benchmarks.cpu_linear import cpu_name
from benchmarks.launches import static_cache
from ptqc.codegen.cpp.isa import running_isa

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

PROMPT = 128
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
         "max_position_embeddings": 2048}  # fmt: skip
SIZES_OF_EXPERTS = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "head_dim": 128,
                    "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 4,
                    "norm_topk_prob": True, "max_position_embeddings": 2048}  # fmt: skip
FORMATS = {
    "int4g32": ("rtn", {"spec": "int4g32"}),
    "nf4": ("nf4", {}),
    "hqq4": ("hqq", {"bits": 4}),
    "hqq3": ("hqq", {"bits": 3}),
    "hqq2": ("hqq", {"bits": 2}),
    "gptq": ("gptq", {"act_order": True}),
    "w8a8": ("w8a8", {}),
    "e8p": ("quip_sharp", {}),
    "fp8": ("fp8", {}),
}
"""Method and options by name; gptq is with act-order: groups of columns that are gathered."""
CALIBRATED = ("gptq", "e8p")


def quantized(model, name):
    """The model stored in a format."""
    method, options = FORMATS[name]
    if name in CALIBRATED:
        options = options | {"calibration": [torch.randint(model.config.vocab_size, (1, 64)) for _ in range(2)]}
    return ptqc.quantize(model, method, include=["model.layers*_proj*", "lm_head*"], progress=False, **options)


def random_model(layers, vocabulary, experts=0, dtype=torch.bfloat16):
    """A Llama, or a mixture of experts, with seeded random weights."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    if experts:
        config = transformers.Qwen3MoeConfig(**SIZES_OF_EXPERTS, **shape, num_experts=experts)
    else:
        config = transformers.LlamaConfig(**SIZES, **shape)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def time_torch(model, backend, tokens):
    """Seconds of the prompt (second of two runs) and of each further token, least and median; and of compiling."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache = static_cache(model, PROMPT + tokens)

    def step(ids, start):
        begun = time.perf_counter()
        at = torch.arange(start, start + ids.shape[1])[None]
        inputs = {"input_ids": ids, "position_ids": at, "past_key_values": cache, "use_cache": True}
        logits = compiled(**inputs, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True), time.perf_counter() - begun

    prompt = torch.arange(5, 5 + PROMPT)[None]
    _, compiling = step(prompt, 0)
    cache.reset()
    token, prefill = step(prompt, 0)
    token, more = step(token, PROMPT)
    took = []
    for position in range(PROMPT + 1, PROMPT + tokens):
        token, seconds = step(token, position)
        took.append(seconds)
    return summary(prefill, took) | {"compile_s": compiling + more}


def time_llama(model, quant, threads, tokens):
    """The same by llama.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        ptqc.export(model, "gguf", path, quant=quant, tokenizer=reference.FOLDER)
        runner = llama_cpp.Llama(
            str(path), n_ctx=PROMPT + tokens, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        took = []
        for _ in range(2):
            runner.reset()
            begun = time.perf_counter()
            runner.eval(list(range(5, 5 + PROMPT)))
            prefill = time.perf_counter() - begun
        for token in range(5, 4 + tokens):
            begun = time.perf_counter()
            runner.eval([token])
            took.append(time.perf_counter() - begun)
        return summary(prefill, took)


def summary(prefill, took):
    took = sorted(took)
    return {"prefill_ms": prefill * 1e3, "least_ms": took[0] * 1e3, "median_ms": took[len(took) // 2] * 1e3}


def measure(arguments, threads):
    """A row for each side."""
    torch.set_num_threads(threads)
    for side in (*arguments.formats, "bfloat16"):
        model = random_model(arguments.layers, arguments.vocabulary, arguments.experts)
        if side != "bfloat16":
            model = quantized(model, side)
            yield {"side": f"ptqc {side}", "threads": threads} | time_torch(model, "ptqc", arguments.tokens)
        elif not arguments.without_bfloat16:
            yield {"side": side, "threads": threads} | time_torch(model, "inductor", arguments.tokens)
        # The very weights of int4g32 in their nearest type, and llama.cpp's usual mix of the float ones.
        quant = {"int4g32": "Q4_0", "bfloat16": "Q4_K_M"}.get(side)
        if quant and llama_cpp is not None:
            found = time_llama(model, quant, threads, arguments.tokens)
            yield {"side": f"llama.cpp {quant}", "threads": threads} | found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 layers, 16 tokens")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--formats", nargs="*", default=["int4g32"], choices=FORMATS)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0: a Llama")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--without-bfloat16", action="store_true", help="it takes minutes on a CPU without AVX512")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.tokens = 4, 16
    rows = []
    print("| side | threads | prompt ms | token ms, least | median | compile s |\n|---|---|---|---|---|---|")
    for threads in arguments.threads:
        for row in measure(arguments, threads):
            shape = {"layers": arguments.layers, "vocabulary": arguments.vocabulary, "experts": arguments.experts}
            rows.append(row | shape)
            cells = [f"{row[key]:.1f}" for key in ("prefill_ms", "least_ms", "median_ms")]
            compiling = f"{row['compile_s']:.0f}" if "compile_s" in row else ""
            print("|", " | ".join([row["side"], str(threads), *cells, compiling]), "|", flush=True)
    if arguments.json:
        document = {
            "rows": rows, "date": datetime.date.today().isoformat(), "cpu": cpu_name(), "isa": running_isa().name,
            "torch": torch.__version__,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        plot(rows, arguments.json.with_suffix(".png"))


def plot(rows, path):
    """Tokens per second of every side, by threads."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    counts = sorted({row["threads"] for row in rows})
    figure, axes = pyplot.subplots(1, len(counts), figsize=(1 + 5 * len(counts), 1 + 0.35 * len(rows) / len(counts)))
    for axis, threads in zip(axes if len(counts) > 1 else [axes], counts, strict=True):
        chosen = sorted((row for row in rows if row["threads"] == threads), key=lambda row: -row["least_ms"])
        speeds = [1e3 / row["least_ms"] for row in chosen]
        colors = ["tab:blue" if row["side"].startswith("ptqc") else "tab:gray" for row in chosen]
        axis.bar_label(axis.barh([row["side"] for row in chosen], speeds, color=colors), fmt="%.1f", padding=3)
        axis.set(title=f"{threads} thread{'s' if threads > 1 else ''}", xlabel="tokens per second", xmargin=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
