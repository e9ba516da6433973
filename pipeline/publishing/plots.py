"""Plots of updates as PNG, readable on a phone and without colour vision.

Enters: the history of a model, or one report. Leaves: bytes of a PNG. Colours are Okabe and Ito's (2008), and no
meaning rests on colour alone: every line carries its name.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pipeline.evaluation.metrics import CalibrationBin
from pipeline.outcome import LossPoint, PlanRecord, UpdateReport

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
_GREY = "#6b6b6b"
_SIZE_INCHES = (7.2, 4.3)
_DPI = 150


def auc_by_hour(history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """AUC before learning with its band, and the frozen model's beside it; None without two hours that have an AUC.

    Args:
        history: what `read_history` gives.
    """
    hours = [entry for entry in history if _value(entry, "before", "auc") is not None]
    if len(hours) < 2:
        return None
    times = [_middle(entry) for entry in hours]
    figure, axes = _figure(_auc_title(hours), "AUC", "hour of the clicks (UTC)")
    put_subtitle(axes, "Each hour is scored before it is learned. Shaded: 95 % interval.")
    _band(axes, hours, times)
    lines = {"kept fresh": ([_value(entry, "before", "auc") for entry in hours], BLUE, "-")}
    frozen = [_value(entry, "frozen", "auc") for entry in hours]
    if any(auc is not None for auc in frozen):
        lines["frozen"] = (frozen, ORANGE, "--")
    for values, colour, style in lines.values():
        axes.plot(times, _gaps(values), style, color=colour, lw=2, marker="o", ms=3.5 if len(hours) <= 48 else 0)  # type: ignore[arg-type]
    _name_line_ends(axes, times[-1], {name: (values, colour) for name, (values, colour, _) in lines.items()})
    _time_axis(axes)
    return png(figure)


def loss_curve(points: Sequence[LossPoint]) -> bytes | None:
    """Log loss of the steps of one window, each before it was learned, and its running mean; None below two points."""
    if len(points) < 2:
        return None
    rows = np.array([point.rows for point in points], dtype=np.float64)
    losses = np.array([point.log_loss for point in points])
    counts = np.diff(rows, prepend=0.0)
    mean = np.cumsum(losses * counts) / np.maximum(np.cumsum(counts), 1.0)
    figure, axes = _figure("Log loss of the window's rows, each before it was learned", "log loss (nats)", "rows learned")
    put_subtitle(axes, "Thin: mean of a few steps. Thick: mean over the window so far.")
    axes.plot(rows, losses, color=BLUE, lw=1, alpha=0.45)
    axes.plot(rows, mean, color=BLUE, lw=2.8)
    count_axis(axes)
    return png(figure)


def calibration(bins: Sequence[CalibrationBin]) -> bytes | None:
    """Click rate over predicted probability by bins of equal mass, with 95 % intervals; None without bins."""
    if not bins:
        return None
    predicted = np.array([part.mean_probability for part in bins])
    clicked = np.array([part.click_rate for part in bins])
    low, high = _wilson(clicked, np.array([part.rows for part in bins], dtype=np.float64))
    figure, axes = _figure("Predicted and actual click rate in groups of equal size", "click rate", "predicted probability")
    put_subtitle(axes, "Bars: 95 % intervals of the click rate.")
    limit = 1.08 * float(max(predicted.max(), high.max()))
    axes.plot([0, limit], [0, limit], color=_GREY, lw=1.2, ls=":")
    axes.annotate("as predicted", (0.93 * limit, 0.93 * limit), xytext=(-8, 0), textcoords="offset points", **_grey("right"))
    axes.errorbar(predicted, clicked, [clicked - low, high - clicked], fmt="o", color=BLUE, ms=5, lw=1.5, capsize=2)
    axes.annotate("clicked more often\nthan predicted", (0.03, 0.95), xycoords="axes fraction", va="top", **_grey("left"))
    axes.annotate("clicked less often\nthan predicted", (0.97, 0.05), xycoords="axes fraction", **_grey("right"))
    axes.set(xlim=(0, limit), ylim=(0, limit))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    return png(figure)


def batch_and_rate(plan: Sequence[PlanRecord], rows: int) -> bytes | None:
    """Batch size and learning rate over the rows of one window, as planned; None without a plan.

    Args:
        plan: decisions in order.
        rows: of the window, where the last decision ends.
    """
    if not plan:
        return None
    starts = [record.position for record in plan]
    figure = _canvas()
    panels = figure.subplots(2, 1, sharex=True)
    sizes = [record.batch_size for record in plan]
    changes = sum(before != after for before, after in pairwise(sizes))
    times = {0: "stayed the same", 1: "changed once"}.get(changes, f"changed {changes:,} times")
    put_title(panels[0], f"The batch size {times} over the window")
    put_subtitle(
        panels[0], f"{len(plan):,} {'decision' if len(plan) == 1 else 'decisions'}; the rate is the dense optimizer's."
    )
    series: tuple[tuple[Axes, str, list[float], str], ...] = (
        (panels[0], "batch size (rows)", [float(record.batch_size) for record in plan], BLUE),
        (panels[1], "learning rate", [record.learning_rate for record in plan], GREEN),
    )
    for axes, label, values, colour in series:
        tidy(axes)
        axes.step([*starts, max(rows, starts[-1])], [*values, values[-1]], where="post", color=colour, lw=2.2)
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.15 * max(values))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    panels[0].yaxis.set_major_formatter(FuncFormatter(short_count))
    panels[1].set_xlabel("rows of the window")
    count_axis(panels[1])
    return png(figure)


def update_plots(
    report: UpdateReport, history: Sequence[Mapping[str, Any]], bins: Sequence[CalibrationBin] = ()
) -> dict[str, bytes]:
    """File name to PNG, of every plot for which there is something to show."""
    makers: dict[str, Callable[[], bytes | None]] = {
        "auc_by_hour.png": lambda: auc_by_hour(history),
        "calibration.png": lambda: calibration(bins),
        "loss_curve.png": lambda: loss_curve(report.loss_curve),
        "batch_and_rate.png": lambda: batch_and_rate(report.plan, report.rows),
    }
    made = {name: make() for name, make in makers.items()}
    return {name: png for name, png in made.items() if png is not None}


def _figure(title: str, y_label: str, x_label: str) -> tuple[Figure, Axes]:
    figure = _canvas()
    axes = figure.subplots()
    tidy(axes)
    put_title(axes, title)
    axes.set_ylabel(y_label)
    axes.set_xlabel(x_label)
    return figure, axes


def _canvas() -> Figure:
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure


def put_title(axes: Axes, text: str) -> None:
    """What a plot says, above it on the left."""
    axes.set_title(text, loc="left", fontsize=13.5, fontweight="bold", pad=26)


def put_subtitle(axes: Axes, text: str) -> None:
    """A grey line below the title."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(text, (0, 1), xytext=(0, 9), **place, **_grey("left"))


def tidy(axes: Axes) -> None:
    """Two spines, a light grid, legible ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.grid(axis="y", color="#e3e3e3", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11, colors="#333333")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(12)


def _auc_title(hours: Sequence[Mapping[str, Any]]) -> str:
    """The gain over the frozen model, weighted by rows as the means of the flows are."""
    compared = [entry for entry in hours if _value(entry, "frozen", "auc") is not None]
    if not compared:
        return "AUC on each hour's clicks, before they are learned"
    gains = [entry["before"]["auc"] - entry["frozen"]["auc"] for entry in compared]
    gain = float(np.average(gains, weights=[entry["rows"] for entry in compared]))
    return f"Keeping the model fresh {'gains' if gain >= 0 else 'loses'} {abs(gain):.3f} AUC over freezing it"


def _band(axes: Axes, hours: Sequence[Mapping[str, Any]], times: Sequence[datetime]) -> None:
    low = _gaps([_value(entry, "before", "auc_interval", "low") for entry in hours])
    high = _gaps([_value(entry, "before", "auc_interval", "high") for entry in hours])
    axes.fill_between(times, low, high, color=BLUE, alpha=0.15, lw=0)  # type: ignore[arg-type]


def _name_line_ends(axes: Axes, last: datetime, lines: Mapping[str, tuple[Sequence[Any], str]]) -> None:
    ends = {name: [v for v in values if v is not None][-1] for name, (values, _) in lines.items()}
    low, high = axes.get_ylim()
    apart = 0.07 * (high - low)
    height = float("inf")
    for name in sorted(ends, key=lambda line: -ends[line]):
        height = min(ends[name], height - apart)
        axes.annotate(
            f"{name}\n{ends[name]:.3f}",
            (last, height),
            xytext=(9, 0),
            textcoords="offset points",
            color=lines[name][1],
            fontsize=12,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )
        height -= apart


def _time_axis(axes: Axes) -> None:
    locator = AutoDateLocator(minticks=3, maxticks=7)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(
        ConciseDateFormatter(  # type: ignore[no-untyped-call]
            locator,
            formats=["%Y", "%b", "%-d %b", "%H:%M", "%H:%M", "%H:%M"],
            zero_formats=["", "%Y", "%b", "%-d %b", "%-d %b", "%H:%M"],
            show_offset=False,
        )
    )


def count_axis(axes: Axes) -> None:
    """The x axis counts rows from 0."""
    axes.xaxis.set_major_formatter(FuncFormatter(short_count))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(left=0)


def short_count(value: float, _: object = None) -> str:
    """A tick label.

    >>> short_count(120_000)
    '120k'
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _grey(side: str) -> dict[str, Any]:
    return {"ha": side, "color": _GREY, "fontsize": 11}


def _wilson(rate: np.ndarray[Any, Any], count: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Wilson 1927: a 95 % interval of a share, inside [0, 1] and around `rate`."""
    z = 1.959963984540054
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return np.minimum(np.maximum(middle - half, 0), rate), np.maximum(np.minimum(middle + half, 1), rate)


def _value(entry: Mapping[str, Any], *path: str) -> Any:
    value: Any = entry
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _gaps(values: Sequence[float | None]) -> np.ndarray[Any, Any]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _middle(entry: Mapping[str, Any]) -> datetime:
    start, end = (datetime.fromisoformat(entry[name]).astimezone(UTC) for name in ("window_start", "window_end"))
    return start + max(end - start, timedelta()) / 2


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
