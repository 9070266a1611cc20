"""The page of a comparison: one HTML file with table, picture and the error of every layer.

It asks for nothing from anywhere: style, script and both pictures (for light and dark screens) are in it.
"""

import base64
from html import escape
from string import Template

from ptqc.comparison.compare import Comparison, Run
from ptqc.comparison.plot import DARK, LIGHT, to_svg

__all__ = ["render"]

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --paper: #ffffff; --panel: #f6f7f9; --ink: #1f2328; --muted: #656d76; --line: #dfe3e7; --bar: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181d; --panel: #1c2026; --ink: #e6e8eb; --muted: #9aa3ad; --line: #2b3037; --bar: #6cb0ff; }
}
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { color: var(--muted); margin: .25rem 0 1rem; max-width: 50rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .text { text-align: left; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--bar); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: var(--panel); } tr.float td { color: var(--muted); }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
img { width: 100%; height: auto; display: block; }
.layers td:first-child { position: sticky; left: 0; background: var(--paper); }
.layers td, .layers th { padding: .15rem .6rem; } .layers td { border: 0; }
.bar { display: flex; align-items: center; gap: .5rem; min-width: 6.5rem; }
.bar i { height: .6rem; background: var(--bar); border-radius: 2px; opacity: .85; }
.bar span { color: var(--muted); font-size: 12px; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$caption</p>
<div class="scroll"><table id="results">
<thead><tr>$heads</tr></thead>
<tbody>
$rows
</tbody></table></div>
<h2>Perplexity and divergence against size</h2>
<picture><source media="(prefers-color-scheme: dark)" srcset="$dark"><img src="$light" alt="$alt"></picture>
<h2>Error of every layer</h2>
<p>Norm of the difference between the stored and the original weight over the norm of the original. Bars share one
scale: the longest is $largest.</p>
<div class="scroll"><table class="layers">
<thead><tr><th scope="col">weight</th>$columns</tr></thead>
<tbody>
$layers
</tbody></table></div>
<script>
for (const [column, button] of document.querySelectorAll("#results th button").entries()) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = document.querySelector("#results tbody");
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
    body.append(...[...body.rows].sort((a, b) => sign * order(a, b)));
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  });
}
</script>
</body>
</html>
""")

_HEADS = {
    "method": "text", "format": "text", "bits per weight": "number", "model, MB": "number", "perplexity": "number",
    "KL, nats": "number", "same top token": "number", "quantizing, s": "number",
}  # fmt: skip
_HEAD = '<th scope="col" class="{align}"><button type="button">{head}</button></th>'


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    largest = max((layer.error for run in comparison.runs for layer in run.layers), default=0.0)
    return _PAGE.substitute(
        title=f"{escape(comparison.model)}, quantized",
        caption=escape(_caption(comparison)),
        heads="".join(_HEAD.format(align=align, head=escape(head)) for head, align in _HEADS.items()),
        rows="\n".join(_row(run) for run in (comparison.baseline, *comparison.runs)),
        light=_data_uri(to_svg(comparison, LIGHT, has_heading=False)),
        dark=_data_uri(to_svg(comparison, DARK, has_heading=False)),
        alt=escape("Perplexity and KL divergence of each method against its bits per weight; the table has the values"),
        largest=f"{largest:.3f}",
        columns="".join(f'<th scope="col" class="text">{escape(run.label)}</th>' for run in comparison.runs),
        layers="\n".join(_layer_row(name, comparison, largest) for name in _layer_names(comparison)),
    )


def _caption(comparison: Comparison) -> str:
    tokens = comparison.baseline.evaluation.tokens
    windows = f"{comparison.windows} windows of {comparison.window} tokens"
    return (
        f"Scored on {tokens:,} tokens of {comparison.text}: {windows}, not overlapping, the first of each not scored. "
        "KL: divergence of the predictions from those of the float model, mean per token. Lower is better, except for "
        "the share of positions where both find the same token most likely. Click a column to sort."
    )


def _row(run: Run) -> str:
    result = run.evaluation
    cells = [
        f'<td class="text"><code>{escape(run.label)}</code></td>',
        f'<td class="text"><code>{escape(run.spec)}</code></td>',
        _cell(run.bits_per_weight, f"{run.bits_per_weight:.3g}"),
        _cell(run.nbytes, f"{run.nbytes / 1e6:.1f}"),
        _cell(result.perplexity, f"{result.perplexity:.2f}"),
        _cell(result.kl or 0, "" if result.kl is None else f"{result.kl:.5f}"),
        _cell(1 if result.top1 is None else result.top1, "" if result.top1 is None else f"{100 * result.top1:.1f}%"),
        _cell(run.quantize_seconds, f"{run.quantize_seconds:.1f}" if run.layers else ""),
    ]
    start = "<tr>" if run.layers else '<tr class="float">'
    return f"{start}{''.join(cells)}</tr>"


def _cell(value: float, shown: str) -> str:
    return f'<td data-value="{value!r}">{shown}</td>'


def _layer_names(comparison: Comparison) -> list[str]:
    """Every weight that some run quantized, in the order of the model."""
    return list(dict.fromkeys(layer.name for run in comparison.runs for layer in run.layers))


def _layer_row(name: str, comparison: Comparison, largest: float) -> str:
    cells = []
    for run in comparison.runs:
        error = next((layer.error for layer in run.layers if layer.name == name), None)
        if error is None:
            cells.append('<td class="text">float</td>')
            continue
        width = 4 * error / largest if largest else 0
        cells.append(f'<td><div class="bar"><i style="width:{width:.2f}rem"></i><span>{error:.3f}</span></div></td>')
    return f"<tr><td><code>{escape(name.removesuffix('.weight'))}</code></td>{''.join(cells)}</tr>"


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
