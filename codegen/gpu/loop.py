"""Lines of the loop of `ptqc.codegen.gpu.weight_only`: what a step loads, decodes and multiplies."""

import re
from itertools import chain

from ptqc.codegen.gpu.forms import WeightForm

__all__ = ["decode_lines", "group_lines", "loop_lines", "number_lines"]


def decode_lines(form: WeightForm) -> list[str]:
    """A block decoded as a whole."""
    return [*_word_lines(form), *group_lines(form), *number_lines(form), *form.calls]


def _word_lines(form: WeightForm) -> list[str]:
    rows = form.layout.rows
    return [f'w{i} = tl.load(w_at + {i * rows} * NP, eviction_policy="evict_first")' for i in range(form.layout.words)]


def group_lines(form: WeightForm) -> list[str]:
    """Words v<i> that hold the scales and zeros of the groups in a block."""
    if form.fields_per_scale is None:
        return []
    words = -(-len(_scale_names(form)) // _numbers_per_word(form))
    blocks = form.inputs_per_row // form.layout.block
    row = "block" if blocks == 1 else f"(block // {blocks})"
    return [f"s_at = s_ptr + {row} * {words} * NP + rn", *(f"v{i} = tl.load(s_at + {i} * NP)" for i in range(words))]


def number_lines(form: WeightForm) -> list[str]:
    """Scales s<i> and zeros z<i> from those words, where levels do not come scaled from their decoder."""
    if form.fields_per_scale is None or form.is_scaled:
        return []
    per_word = _numbers_per_word(form)
    halves = ("low", "high") if per_word == 2 else ("full",)
    return [f"{name} = {halves[i % per_word]}(v{i // per_word})" for i, name in enumerate(_scale_names(form))]


def _scale_names(form: WeightForm) -> list[str]:
    count = form.scales_per_row
    return [f"s{i}" for i in range(count)] + [f"z{i}" for i in range(count) if form.subtracted.is_tile]


def _numbers_per_word(form: WeightForm) -> int:
    return 1 if form.half is None else 2


def loop_lines(form: WeightForm, k: int) -> list[str]:
    """Loads first; then fields are multiplied as soon as they are decoded, which leaves more registers."""
    lines = [*_word_lines(form), *_input_lines(form, k)]
    numbers = {line.split()[0]: line for line in number_lines(form)}
    fields = range(form.layout.fields)
    last = [max(i for i, call in enumerate(form.calls) if re.search(rf"\bf{j}\b", call)) for j in fields]
    for i, call in enumerate(form.calls):
        products = (_product_lines(form, j) for j in fields if last[j] == i)
        for line in [call, *chain.from_iterable(products)]:
            lines += [numbers.pop(name) for name in re.findall(r"\b[sz]\d+\b", line) if name in numbers]
            lines.append(line)
    return lines


def _input_lines(form: WeightForm, k: int) -> list[str]:
    layout = form.layout
    step = 1 if form.stride > 1 else layout.rows
    lines = []
    for j in range(layout.fields):
        inside = "rows_in"
        if k % layout.block:
            inside += f" & ((x_from + {j * step} + rq * {form.stride}) < K)[:, None]"
        lines.append(f"x{j} = tl.load(x_tile + (x_from + {j * step}), mask={inside}, other=0.0)")
    return lines


def _product_lines(form: WeightForm, j: int) -> list[str]:
    """Field j times its inputs, added up."""
    shared = form.fields_per_scale
    if shared is None or form.is_scaled:
        return [f"acc = product_added(f{j}, x{j}, acc, EMULATED)"]
    begins, ends = j % shared == 0, j % shared == shared - 1
    line = f"t = product(f{j}, x{j}, EMULATED)" if begins else f"t = product_added(f{j}, x{j}, t, EMULATED)"
    return [line, f"acc += t * s{j // shared}"] if ends else [line]
