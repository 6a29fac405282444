"""Figures of errors: while learning, of each arm and seed, against the learning rate; and of logged diagnostics."""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_danns.report.style import COLUMN, PAGE, Style, plain_log, plt, scale_errors, styles

PER_EPOCH = {
    "test error": "test_accuracy",
    "test error of one checkpoint": "val_accuracy",
    "validation error": "val_accuracy",
}
"""The accuracy of each epoch that goes with what the table's error is of."""


def learning_curves(runs: pd.DataFrame, errors: pd.DataFrame, error_of: str, look: dict[str, Style]) -> Figure | None:
    """Error against epoch of the runs in ``errors``: mean over seeds, and a band from the best to the worst."""
    name = PER_EPOCH[error_of]
    shown = runs[runs.folder.isin(errors.folder)].dropna(subset=[name])
    if shown.empty:
        return None
    values = 100 * (1 - shown[name])
    order = errors.groupby("arm").error.mean().sort_values(ascending=False).index  # as the lines lie at their ends
    figure, axes = plt.subplots(figsize=(COLUMN, 2.9) if len(order) <= 5 else (PAGE, 3.6))
    for k, arm in enumerate(order):
        by_epoch = values[shown.arm == arm].groupby(shown.epoch[shown.arm == arm] + 1)
        mean, style = by_epoch.mean(), look[arm]
        axes.fill_between(mean.index, by_epoch.min(), by_epoch.max(), color=style["color"], alpha=0.2, linewidth=0)
        every = max(1, len(mean) // 6)
        axes.plot(mean.index, mean, **style, markevery=(k * every // len(order), every), label=arm)
    axes.set(xlabel="epoch", ylabel=f"{'test' if name.startswith('test') else 'validation'} error (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    top = 3 * errors.error.max()  # the start of training may leave the figure, its end may not
    scale_errors(axes, "y", np.minimum(values, top))
    if axes.get_yscale() == "log":
        axes.set_ylim(0.9 * values[values > 0].min(), min(top, 1.1 * values.max()))
    _legend_outside(figure)
    return figure


def seeds(errors: pd.DataFrame, rows: pd.DataFrame, look: dict[str, Style]) -> Figure:
    """Error of each arm, the best on top: every seed a point, above them their mean and its 95 % interval."""
    longest = max(map(len, rows.arm))
    figure, axes = plt.subplots(figsize=(COLUMN + 0.06 * max(0, longest - 16), 0.7 + 0.36 * len(rows)))
    for y, row in enumerate(rows.itertuples()):
        points, style = errors[errors.arm == row.arm].error, look[row.arm]
        below = y + np.linspace(0.05, 0.3, len(points)) if len(points) > 1 else [y]
        axes.plot(points, below, style["marker"], color=style["color"], alpha=0.75)
        if len(points) > 1:
            axes.plot([row.low, row.high], [y - 0.18] * 2, color="black", linewidth=1, marker="|", markersize=4)
            axes.plot(row.error, y - 0.18, "|", color="black", markersize=8, markeredgewidth=2)
    axes.set_yticks(range(len(rows)), rows.arm)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"{rows.error_of.iloc[0]} (%)")
    axes.tick_params(axis="y", length=0)
    scale_errors(axes, "x", errors.error)
    if axes.get_xscale() == "log":  # an interval may reach below 0
        axes.set_xlim(left=0.85 * errors.error[errors.error > 0].min())
    return figure


def learning_rates(runs: pd.DataFrame, last: int, look: dict[str, Style]) -> Figure | None:
    """Lowest validation error against learning rate; where there is none, test error of the last epochs.

    Joined are runs that were trained to their end; those that were stopped before are hollow, those that diverged are
    above. None if no family of arms has two learning rates.
    """
    points = learning_rate_points(runs, last)
    if points.empty or points.groupby("family").lr.nunique().max() < 2:
        return None
    figure, axes = plt.subplots(figsize=(COLUMN, 2.9) if points.family.nunique() <= 5 else (PAGE, 3.6))
    scale_errors(axes, "y", points.error[points.state != "diverged"])
    for k, (family, group) in enumerate(points.groupby("family")):
        style = look[family]
        whole, stopped = (group[group.state == state] for state in ("finished", "stopped"))
        diverged = group[group.state == "diverged"]
        line = whole.groupby("lr").error.mean()
        axes.plot(line.index, line, **{**style, "marker": ""})
        axes.plot(whole.lr, whole.error, style["marker"], color=style["color"], alpha=0.8)
        axes.plot(stopped.lr, stopped.error, style["marker"], color=style["color"], fillstyle="none")
        if len(diverged):  # an empty line outside the axes would still be given room
            above: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(diverged.lr, [1.03 + 0.05 * k] * len(diverged), style["marker"], color=style["color"], **above)
        axes.plot([], [], **style, label=family)
    if (points.state == "diverged").any():
        axes.text(0.02, 1.0, "diverged:", transform=axes.transAxes, va="bottom")
    if (points.state == "stopped").any():
        axes.plot([], [], "o", color="0.4", fillstyle="none", label="stopped early")
    kind = "lowest validation error" if points.error_of.iloc[0].startswith("val") else "test error"
    axes.set(xlabel="learning rate", ylabel=f"{kind} (%)", xscale="log")
    plain_log(axes.xaxis, points.lr)
    _legend_outside(figure)
    return figure


def learning_rate_points(runs: pd.DataFrame, last: int) -> pd.DataFrame:
    """A row for each run and trial that has a learning rate: its error, and how it ended."""
    rows = []
    column = "val_accuracy" if runs.val_accuracy.notna().any() else "test_accuracy"
    for _, run in runs[runs.lr.notna()].groupby("folder", sort=False):
        accuracy = run[column].dropna()
        if column == "test_accuracy":  # nothing may be selected by test images, so no best epoch
            accuracy = run[run.epoch > run.epoch.max() - last][column].dropna()
        best = accuracy.max() if column == "val_accuracy" else accuracy.mean()  # NaN if there is none
        first = run.iloc[0]
        state = "diverged" if first.diverged else "finished" if first.finished else "stopped"
        if first.diverged or (len(accuracy) and (first.finished or first.trial)):  # no runs that are still going
            rows.append([first.family, first.lr, 100 * (1 - best), state, column])
    return pd.DataFrame(rows, columns=["family", "lr", "error", "state", "error_of"])


def diagnostics(runs: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """For each arm with logged ``LAYER/QUANTITY``: its name, and a panel for each quantity with a line for each layer.

    Lines are means over the arm's finished runs, or over all if none is finished.
    """
    names = [name for name in runs if re.fullmatch(r"(?!lr-)[^/]+/.*\D.*", name)]
    for arm, group in runs[~runs.trial].groupby("arm"):
        shown = group[group.finished] if group.finished.any() else group
        logged = shown.groupby(shown.epoch + 1)[names].mean().dropna(axis=1, thresh=2)  # one epoch is no course
        if not logged.empty:
            yield str(arm), _panels(logged)


def _panels(logged: pd.DataFrame) -> Figure:
    split = [name.split("/", 1) for name in logged]
    layers, quantities = (list(dict.fromkeys(part)) for part in zip(*split, strict=True))
    columns = min(3, len(quantities))
    count = math.ceil(len(quantities) / columns)
    size = (PAGE * columns / 3, 1.55 * count + 0.35 + 0.17 * math.ceil(len(layers) / 4))
    figure, axes = plt.subplots(count, columns, figsize=size, sharex=True, squeeze=False)
    look = styles(layers)
    for quantity, panel in zip(quantities, axes.flat, strict=False):
        for layer in layers:
            if f"{layer}/{quantity}" in logged:
                values = logged[f"{layer}/{quantity}"].dropna()
                every = max(1, len(values) // 5)
                panel.plot(values.index, values, **look[layer], markevery=every, label=layer)
        panel.set_title(quantity)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_locator(MaxNLocator(4))
    for panel in axes.flat[len(quantities) :]:
        panel.set_visible(False)
    for column in range(columns):
        lowest = max(row for row in range(count) if row * columns + column < len(quantities))
        axes[lowest, column].tick_params(labelbottom=True)
    figure.supxlabel("epoch", fontsize=8)
    handles = {label: h for panel in axes.flat for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, len(layers)))
    return figure


def _legend_outside(figure: Figure) -> None:
    """Below a figure as wide as a column, to the right of a wider one."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if figure.get_figwidth() > COLUMN:
        figure.legend(handles, labels, loc="outside right upper")
        return
    columns = 1 if max(map(len, labels), default=0) > 24 else 2
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
