"""Figures of the laboratory: readable on a phone and without colour vision, small as files.

Colours are Okabe and Ito's (2008); lines differ by dash and marker too, and carry their names.
"""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from pipeline.publishing.plots import BLACK, BLUE, GREEN, ORANGE, png, short_count, tidy

SKY, PURPLE, AMBER, GREY = "#56B4E9", "#CC79A7", "#E69F00", "#6b6b6b"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
STYLES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

TITLE_CHARACTERS = 38
MANY_TICKS = 3_000
"""An axis that spans more has ticks at powers of ten only."""
MOST_COLOURS = 48
"""Of a file: text and thin lines stay smooth."""


def look(number: int) -> dict[str, Any]:
    """Colour, dash and marker of line `number`, as `axes.plot` takes them."""
    count = number % len(COLOURS)
    return {"color": COLOURS[count], "linestyle": STYLES[number % len(STYLES)], "marker": MARKERS[count], "ms": 6, "lw": 2.2}


def canvas(panels: int = 1, *, panel_inches: float = 3.5) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` one below the other, tidied: side by side, their text would be too small on a phone."""
    figure = Figure(
        figsize=(5.6, panel_inches * panels),
        dpi=120,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    FigureCanvasAgg(figure)
    every = list(figure.subplots(panels, 1, squeeze=False).flat)
    for axes in every:
        tidy(axes)
    return figure, every


def name_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """What a panel shows, above it on the left, and its axes with their units; a long title takes two lines."""
    axes.set_title(textwrap.fill(title, TITLE_CHARACTERS), loc="left", fontsize=13, fontweight="bold", pad=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def log_counts(axes: Axes, which: str = "x") -> None:
    """A logarithmic axis whose ticks are counts, such as 50 or 4k: `which` is "x", "y" or "xy". Call it after plotting."""
    for letter in which:
        axis = axes.xaxis if letter == "x" else axes.yaxis
        (axes.set_xscale if letter == "x" else axes.set_yscale)("log")
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < MANY_TICKS * low else (1.0,), numticks=12))
        axis.set_major_formatter(FuncFormatter(short_count))
        axis.set_minor_formatter(NullFormatter())


def tick_sizes(axes: Axes, sizes: Sequence[float], names: Sequence[str] | None = None) -> None:
    """A logarithmic x axis with a tick at each of `sizes`, the batch sizes that were run."""
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), list(names or [f"{size:,g}" for size in sizes]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def legend(axes: Axes, **more: Any) -> None:
    """The names of the lines, large enough for a phone."""
    axes.legend(**({"fontsize": 11, "frameon": False, "handlelength": 2.6} | more))


def small_png(figure: Figure) -> bytes:
    """The figure as a file of few colours."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(png(figure))).convert("RGB")
    image.quantize(MOST_COLOURS, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
