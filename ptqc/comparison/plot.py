"""The picture of a comparison: perplexity and divergence against bits per weight."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqc.comparison.compare import Comparison, Run
from ptqc.errors import PtqcError

try:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    from ptqc.comparison.labels import place_labels
except ImportError:
    raise PtqcError("the picture takes matplotlib: pip install 'ptqc[plot]'") from None

__all__ = ["DARK", "LIGHT", "Theme", "draw", "to_png", "to_svg"]


@dataclass(frozen=True)
class Theme:
    """Colours of a picture. series: one for each method, in the order of the comparison."""

    paper: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1f2328", "#656d76", "#e6e8eb",
    ("#0b62c4", "#c2410c", "#0f7b57", "#7c3aed", "#a21a5b", "#8a6d00", "#44546a"),
)  # fmt: skip
DARK = Theme(
    "#15181d", "#e6e8eb", "#9aa3ad", "#2b3037",
    ("#6cb0ff", "#ff9a62", "#4fd1a1", "#b79bff", "#f48cc0", "#e0c04f", "#a9b7c9"),
)  # fmt: skip
_MARKERS = "osD^vhp"


def draw(comparison: Comparison, theme: Theme = LIGHT, *, has_heading: bool = True) -> Any:
    """A matplotlib Figure with two panels: perplexity (the float model a line), and KL divergence on a log axis.

    has_heading: name the model and the text above them.
    """
    with rc_context(_style(theme)):
        figure = Figure(figsize=(11, 5.6 if has_heading else 4.8), dpi=150)
        FigureCanvasAgg(figure)  # has a renderer, which placing labels needs
        left, right = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.055, right=0.98, bottom=0.11, top=0.79 if has_heading else 0.92, wspace=0.17)
        if has_heading:
            figure.text(0.02, 0.93, f"{Path(comparison.model).name}, quantized", fontsize=15, fontweight="bold")
            figure.text(0.02, 0.885, _caption(comparison), fontsize=9.5, color=theme.muted)
        _panel(left, comparison, theme, _perplexity)
        _panel(right, comparison, theme, _divergence)
        left.set_title("Perplexity")
        right.set_title("KL divergence from the float model, nats per token")
        _draw_float(left, comparison, theme)
        _log_axis(left, _wide_range)
        _log_axis(right, _all_positive)
        figure.draw_without_rendering()
        for axes in (left, right):
            place_labels(axes)
    return figure


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": theme.muted, "axes.linewidth": 0.8,
        "axes.facecolor": theme.paper, "figure.facecolor": theme.paper, "savefig.facecolor": theme.paper,
        "text.color": theme.ink, "axes.labelcolor": theme.muted, "axes.titlecolor": theme.ink, "axes.titlepad": 10,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "xtick.major.size": 3, "ytick.major.size": 3,
        "axes.grid": True, "grid.color": theme.grid, "grid.linewidth": 0.8, "axes.axisbelow": True,
    }  # fmt: skip


def _perplexity(run: Run) -> float:
    return run.evaluation.perplexity


def _divergence(run: Run) -> float:
    return run.evaluation.kl or 0.0


def _caption(comparison: Comparison) -> str:
    tokens = comparison.baseline.evaluation.tokens
    windows = f"{comparison.windows} windows of {comparison.window}"
    return f"{tokens:,} tokens of {comparison.text}, {windows}; lower is better"


def _by_method(runs: Sequence[Run]) -> Iterator[list[Run]]:
    for method in dict.fromkeys(run.method for run in runs):
        yield sorted((run for run in runs if run.method == method), key=lambda run: run.bits_per_weight)


def _panel(axes: Any, comparison: Comparison, theme: Theme, value: Callable[[Run], float]) -> None:
    axes.set_xlabel("bits per weight, scales included")
    for number, runs in enumerate(_by_method(comparison.runs)):
        colour = theme.series[number % len(theme.series)]
        marker = _MARKERS[number % len(_MARKERS)]
        bits, values = [run.bits_per_weight for run in runs], [value(run) for run in runs]
        axes.plot(bits, values, color=colour, linewidth=1.2, alpha=0.55, zorder=2)
        axes.scatter(bits, values, color=colour, marker=marker, s=38, zorder=3, edgecolors=theme.paper, linewidths=0.8)
        for run, x, y in zip(runs, bits, values, strict=True):
            leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 4}
            axes.annotate(run.label, (x, y), textcoords="offset points", xytext=(0, 0), color=colour, fontsize=9.5,
                          zorder=4, arrowprops=leader)  # fmt: skip
    axes.margins(x=0.12, y=0.14)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_float(axes: Any, comparison: Comparison, theme: Theme) -> None:
    perplexity = comparison.baseline.evaluation.perplexity
    axes.axhline(perplexity, color=theme.muted, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
    label = f"{comparison.baseline.spec} {perplexity:.4g}"
    axes.annotate(label, (1, perplexity), xycoords=("axes fraction", "data"), textcoords="offset points",
                  xytext=(0, -4), ha="right", va="top", color=theme.muted, fontsize=9.5)  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, perplexity - 0.1 * (high - perplexity)), high)


def _wide_range(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 3 * min(values)


def _all_positive(values: Sequence[float]) -> bool:
    return min(values) > 0


def _log_axis(axes: Any, is_wanted: Callable[[Sequence[float]], bool]) -> None:
    if is_wanted([note.xy[1] for note in axes.texts]):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def to_png(comparison: Comparison, theme: Theme = LIGHT) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    draw(comparison, theme).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(comparison: Comparison, theme: Theme = LIGHT, *, has_heading: bool = True) -> bytes:
    """The picture as SVG, its text as outlines; the same bytes for the same comparison."""
    buffer = io.BytesIO()
    figure = draw(comparison, theme, has_heading=has_heading)
    with rc_context({"svg.hashsalt": "ptqc"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
