"""`ptqc generate`: text from a model, as it comes."""

import time
from typing import Annotated

import typer

from ptqc.cli._models import Device, Dtype, Model, TrustRemoteCode, load_model, load_tokenizer
from ptqc.cli._output import Json, emit, note
from ptqc.errors import PtqcError

__all__ = ["generate"]

Prompt = Annotated[str, typer.Option(help="The text to continue.")]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token, more is more varied.", min=0.0)]
Seed = Annotated[int, typer.Option(help="Seed of the sampling.")]


def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    is_json: Json = False,
) -> None:
    """Continue a prompt.

    The text appears on stdout while it is generated.
    """
    import torch
    from transformers import PreTrainedModel, TextStreamer

    tokenizer = load_tokenizer(model, trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise PtqcError("the prompt is empty; give at least one word (--prompt)")
    loaded = load_model(model, device, dtype, trust_remote_code)
    if not isinstance(loaded, PreTrainedModel) or not loaded.can_generate():
        raise PtqcError(f"{type(loaded).__name__} does not generate text; only causal language models do")
    streamer = None if is_json else TextStreamer(tokenizer, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.no_grad():
        ids = loaded.generate(
            **inputs.to(loaded.device), max_new_tokens=max_new_tokens, streamer=streamer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, **sampling,
        )[0]  # fmt: skip
    seconds = time.perf_counter() - started
    new = ids[inputs["input_ids"].shape[-1] :]
    document = {
        "model": model, "prompt": prompt, "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new), "seconds": seconds,
    }  # fmt: skip
    emit(document, lambda: note(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} per second"), is_json)
