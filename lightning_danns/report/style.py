"""How all figures look: at the size of a column, an arm alike in each, told apart by marker and dash as by colour."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

COLUMN, PAGE = 3.5, 7.0
"""Widths in inches of a column and of a page."""

# Okabe & Ito's palette, which colour-blind readers can tell apart; wine and grey instead of its yellow, pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))

RC: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lightning_danns",  # equal figures are equal files
}

Style = dict[str, Any]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Colour, marker and dash for each name; their counts have no common divisor, so that pairs repeat late."""
    return {
        name: {
            "color": COLOURS[k % len(COLOURS)],
            "marker": MARKERS[k % len(MARKERS)],
            "linestyle": DASHES[k % len(DASHES)],
        }
        for k, name in enumerate(dict.fromkeys(names))
    }


def save(figure: Figure, path: Path) -> None:
    """Write ``path``.png (200 dpi) and ``path``.svg."""
    figure.savefig(f"{path}.png", dpi=200)
    figure.savefig(f"{path}.svg", metadata={"Date": None})
    plt.close(figure)


def scale_errors(axes: Axes, which: str, values: Any) -> None:
    """Errors in percent: logarithmic, so that the end of training shows, unless they are all of one size."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    axis = axes.xaxis if which == "x" else axes.yaxis
    if len(values) and values.max() > 3 * values.min():
        axes.set(**{f"{which}scale": "log"})
        plain_log(axis, values)
    else:
        axis.set_major_locator(MaxNLocator(6))


def plain_log(axis: Axis, values: Any) -> None:
    """Ticks of a logarithmic axis that spans ``values``, as plain numbers."""
    span = max(values) / min(values)
    subs = (1, 1.5, 2, 3, 5, 7) if span < 8 else (1, 2, 5) if span < 50 else (1, 3) if span < 300 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
