"""Figures of what a task is judged by: while learning and against the learning rate; and of diagnostics."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_danns.study.tables import label

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, which is pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
RC: Any = {
    **{"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False},
    **{"lines.markersize": 4, "lines.linewidth": 1.3, "legend.frameon": False},
    **{"svg.fonttype": "none", "svg.hashsalt": "lightning_danns"},  # text stays text, equal figures are equal files
}


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker for each name; their counts have no common divisor, so that pairs repeat late."""
    looks = enumerate(dict.fromkeys(names))
    return {name: {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]} for k, name in looks}


def curves(runs: pd.DataFrame, metric: str, mode: str) -> Figure:
    """``metric`` against epoch: a thin line for each seed, and their mean."""
    figure, axes = _figure()
    for arm, style in styles(sorted(runs.arm.unique())).items():
        seeds = runs[runs.arm == arm].pivot_table(index="epoch", columns="folder", values=metric)
        seeds.index += 1
        mean = seeds.mean(axis=1)
        axes.plot(seeds, color=style["color"], alpha=0.4, linewidth=0.5)
        axes.plot(mean, **style, markevery=max(1, len(mean) // 6), label=label(arm))
    low, high = runs[metric].quantile([0.05, 1] if mode == "max" else [0, 0.95])  # the start may leave the figure
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set(xlabel="epoch", ylabel=label(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right upper")
    return figure


def learning_rates(trials: pd.DataFrame, monitor: str, mode: str) -> Figure | None:
    """Best epoch of each trial against its learning rate, if that was searched; hollow: it ended early."""
    if trials.lr.nunique() < 2 or monitor not in trials:
        return None
    ends = trials.groupby(["arm", "folder"], as_index=False).agg({monitor: mode, "lr": "first", "finished": "first"})
    figure, axes = _figure()
    for arm, style in styles(sorted(ends.arm.unique())).items():
        for whole, group in ends[ends.arm == arm].groupby("finished"):
            fill = {"linestyle": "", "fillstyle": "full" if whole else "none"}
            axes.plot(group.lr, group[monitor], **style, **fill, label=label(arm if whole else f"{arm}, ended early"))
    axes.set(xlabel="learning rate", xscale="log", ylabel=f"best {label(monitor)}")
    figure.legend(loc="outside right upper")
    return figure


def diagnostics(runs: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """For each arm that logs ``LAYER/QUANTITY``: its name, a panel for each quantity, a line for each layer."""
    names = [name for name in runs if re.fullmatch(r"(?!lr-)[^/]+/.*\D.*", name)]
    for arm, group in runs[~runs.trial].groupby("arm"):
        logged = group.groupby(group.epoch + 1)[names].mean().dropna(axis=1, thresh=2)  # one epoch is no course
        quantities = list(dict.fromkeys(name.split("/", 1)[1] for name in logged))
        if not quantities:
            continue
        look, rows = styles(name.split("/", 1)[0] for name in logged), -(-len(quantities) // 3)
        figure = Figure(figsize=(7, 1.7 * rows + 0.4), layout="constrained")
        for k, quantity in enumerate(quantities):
            panel = figure.add_subplot(rows, 3, k + 1, title=label(quantity), xlabel="epoch")
            for layer, style in look.items():
                values = logged.get(f"{layer}/{quantity}", logged.iloc[:0, 0]).dropna()
                panel.plot(values, **style, markevery=max(1, len(values) // 5), label=label(layer))
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        yield str(arm), figure


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    return figure, figure.add_subplot()
