"""Plots of a comparison as PNG, readable without colour vision: every line carries its name.

Enters: a `Comparison`. Leaves: bytes of a PNG. Means over seeds; at each window the seeds have all seen the same rows.

Letters: W windows, S seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pipeline.comparison.run import StrategyRun
from pipeline.comparison.summary import Comparison
from pipeline.publishing.plots import BLACK, BLUE, GREEN, ORANGE, count_axis, png, put_subtitle, put_title, short_count, tidy

F64 = npt.NDArray[np.float64]

SKY, PURPLE, AMBER = "#56B4E9", "#CC79A7", "#E69F00"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY)
_STYLES = ("-", "--", "-.", (0, (1, 1.2)))
"""Told apart by colour and dash: 24 pairs. The reference is black and thick."""
_GREY = "#6b6b6b"
_DPI = 150


def comparison_plots(comparison: Comparison) -> dict[str, bytes]:
    """File name to PNG."""
    return {
        "auc_by_rows.png": auc_by_rows(comparison),
        "auc_by_seconds.png": auc_by_seconds(comparison),
        "probe_loss.png": probe_loss(comparison),
    }


def auc_by_rows(comparison: Comparison) -> bytes:
    """Mean AUC before learning so far, over the rows that were learned by then."""
    figure, axes = _one_panel(
        "AUC so far, by rows learned", "AUC on rows not learned yet, mean so far", "rows learned since the start"
    )
    _draw_progress(axes, comparison, lambda run: [float(window.rows_learned) for window in run.windows])
    count_axis(axes)
    return png(figure)


def auc_by_seconds(comparison: Comparison) -> bytes:
    """Mean AUC before learning so far, over the seconds of learning that it took; logarithmic."""
    figure, axes = _one_panel(
        "AUC so far, by seconds of learning",
        "AUC on rows not learned yet, mean so far",
        "CPU seconds of learning since the start",
    )
    axes.set_xscale("log")
    _draw_progress(axes, comparison, lambda run: [window.seconds for window in run.windows])
    axes.xaxis.set_major_formatter(FuncFormatter(short_count))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return png(figure)


def probe_loss(comparison: Comparison) -> bytes:
    """Log loss of the probe over the judged windows, one panel a strategy, the reference in each."""
    names = [line.strategy for line in comparison.lines if line.auc is not None]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _canvas(10.0, 1.3 + 1.75 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    reference = _probe_curves(comparison, comparison.reference)
    for place, axes in enumerate(panels.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        _probe_panel(axes, names[place], comparison, reference)
        if place + columns >= len(names):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("windows learned", fontsize=10)
    figure.supylabel("log loss of the probe (nats)", fontsize=11)
    figure.suptitle(
        "Log loss of the same rows, which nobody learns. A line a seed; grey: the reference's mean",
        x=0.01,
        ha="left",
        fontsize=12.5,
        fontweight="bold",
    )
    return png(figure)


@dataclass(frozen=True)
class _Line:
    """A strategy's mean over seeds."""

    name: str
    x_W: F64
    auc_W: F64
    colour: str
    style: Any
    width: float


def _draw_progress(axes: Axes, comparison: Comparison, spent: Callable[[StrategyRun], Sequence[float]]) -> None:
    lines = list(_lines(comparison, spent))
    for line in lines:
        axes.plot(line.x_W, line.auc_W, linestyle=line.style, color=line.colour, lw=line.width)
        axes.plot(line.x_W[-1:], line.auc_W[-1:], "o", color=line.colour, ms=5)
    low, high = min(float(line.auc_W.min()) for line in lines), max(float(line.auc_W.max()) for line in lines)
    axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    _name_lines(axes, lines)
    seeds = len(comparison.runs_of(comparison.reference))
    put_subtitle(axes, f"Each window is scored before it is learned. Means of {seeds} seeds; black: the reference.")


def _lines(comparison: Comparison, spent: Callable[[StrategyRun], Sequence[float]]) -> list[_Line]:
    lines = []
    for number, name in enumerate(line.strategy for line in comparison.lines if line.auc is not None):
        progress = [_progress(run, comparison, spent(run)) for run in comparison.runs_of(name)]
        x_W, auc_W = np.mean(progress, axis=0)
        looks = _look(number)
        colour, style, width = (BLACK, "-", 2.8) if name == comparison.reference else (*looks, 1.8)
        lines.append(_Line(name, x_W, auc_W, colour, style, width))
    return lines


def _look(number: int) -> tuple[str, Any]:
    return _COLOURS[number % len(_COLOURS)], _STYLES[number // len(_COLOURS) % len(_STYLES)]


def _progress(run: StrategyRun, comparison: Comparison, spent: Sequence[float]) -> tuple[F64, F64]:
    """What was spent before each judged window, and the mean AUC of the judged windows up to it, weighted by rows."""
    judged = comparison.judged(run)
    before = dict(zip((window.start for window in run.windows), np.cumsum(spent) - np.asarray(spent), strict=True))
    aucs = np.array([window.before.auc for window in judged if window.before is not None], dtype=np.float64)
    rows = np.array([window.rows for window in judged], dtype=np.float64)
    return np.array([before[window.start] for window in judged]), np.cumsum(aucs * rows) / np.cumsum(rows)


def _name_lines(axes: Axes, lines: Sequence[_Line]) -> None:
    """Names to the right of the axes, in the order of the line ends, apart from each other, each tied to its end."""
    low, high = axes.get_ylim()
    ordered = sorted(lines, key=lambda line: -line.auc_W[-1])
    ends = [(float(line.auc_W[-1]) - low) / (high - low) for line in ordered]
    for line, height in zip(ordered, _apart(ends, least=0.056), strict=True):
        left, right = 1.035, 1.095
        axes.annotate(
            "",
            (line.x_W[-1], line.auc_W[-1]),
            xytext=(left - 0.003, height),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#9a9a9a", "lw": 0.8, "ls": ":", "shrinkA": 0, "shrinkB": 4},
        )
        sample: dict[str, Any] = {"color": line.colour, "linestyle": line.style, "linewidth": line.width}
        axes.add_line(Line2D([left, right], [height, height], transform=axes.transAxes, clip_on=False, **sample))
        axes.annotate(
            f"{line.name}  {line.auc_W[-1]:.4f}",
            (right + 0.012, height),
            xycoords="axes fraction",
            color="#222222",
            fontsize=10.5,
            fontweight="bold" if line.colour == BLACK else "normal",
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], *, least: float) -> list[float]:
    """Falling heights in [0, 1], moved as little as keeps neighbours `least` apart, inside [0, 1] while they fit.

    >>> _apart([0.5, 0.5], least=0.1)
    [0.55, 0.45]
    """
    groups: list[list[float]] = []  # of heights that touch: their sum of centres and their number
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1 and _bottom(groups[-2], least) < _top(groups[-1], least):
            centre, count = groups.pop()
            above, before = groups.pop()
            groups.append([(above * before + centre * count) / (before + count), before + count])
    placed = [centre + least * ((count - 1) / 2 - place) for centre, count in groups for place in range(int(count))]
    for place in range(len(placed)):
        placed[place] = min(placed[place], 1 - least * place)
    for place in reversed(range(len(placed))):
        placed[place] = max(placed[place], least * (len(placed) - 1 - place)) if least * len(placed) <= 1 else placed[place]
    return [round(height, 6) for height in placed]


def _top(group: Sequence[float], least: float) -> float:
    centre, count = group
    return centre + least * count / 2


def _bottom(group: Sequence[float], least: float) -> float:
    centre, count = group
    return centre - least * count / 2


def _probe_panel(axes: Axes, name: str, comparison: Comparison, reference: Sequence[tuple[F64, F64]]) -> None:
    tidy(axes)
    spread = comparison.line(name).probe_spread
    axes.plot(*_mean_curve(reference), color="#9a9a9a", lw=2.4)
    for places, losses in _probe_curves(comparison, name):
        axes.plot(places, losses, color=BLACK if name == comparison.reference else BLUE, lw=0.8, alpha=0.75)
    axes.tick_params(labelsize=9)
    axes.set_title(f"{name}\n", loc="left", fontsize=10.5, fontweight="bold", pad=-2)
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    words = f"spread within a window {spread.mean:.4f}" if spread is not None else ""
    axes.annotate(words, (0, 1), xytext=(0, 3), color=_GREY, fontsize=9.5, **place)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _probe_curves(comparison: Comparison, name: str) -> list[tuple[F64, F64]]:
    """Of each seed: the place in the stream, in windows, and the probe's loss there; of the judged windows."""
    curves = []
    for run in comparison.runs_of(name):
        points = [point for point in run.probe if run.windows[point.window].start >= comparison.first_judged]
        curves.append((np.array([point.place for point in points]), np.array([point.log_loss for point in points])))
    return curves


def _mean_curve(curves: Sequence[tuple[F64, F64]]) -> tuple[F64, F64]:
    places = np.unique(np.concatenate([place for place, _ in curves]))
    return places, np.mean([np.interp(places, place, losses) for place, losses in curves], axis=0)


def _one_panel(title: str, y_label: str, x_label: str) -> tuple[Figure, Axes]:
    figure = _canvas(10.0, 5.4)
    axes = figure.subplots()
    tidy(axes)
    put_title(axes, title)
    axes.set_ylabel(y_label)
    axes.set_xlabel(x_label)
    return figure, axes


def _canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure
