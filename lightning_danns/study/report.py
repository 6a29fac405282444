"""The folder of a report: tables (Markdown, CSV) and figures (PNG, SVG), all in report.md."""

import re
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_danns.errors import UsageError
from lightning_danns.study.runs import load_runs
from lightning_danns.study.settings import user_path
from lightning_danns.study.tables import cell, file_name, label, line, markdown, run_values, table

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
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
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
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for arm, style in styles(sorted(ends.arm.unique())).items():
        for whole, group in ends[ends.arm == arm].groupby("finished"):
            fill: Any = {"linestyle": "", "fillstyle": "full" if whole else "none"}
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


def write_report(folders: Sequence[Path], out: Path, last: int = 5) -> str:
    """Write the report of all runs below ``folders`` into ``out``; its tables, and where it is."""
    runs, left_out = load_runs(*folders)
    reasons = [f"{line(folder)}: {line(reason)}" for folder, reason in left_out.items()]
    if runs.empty:
        below = ", ".join(map(str, folders))
        raise UsageError("\n".join([f"no runs (folders with metrics.csv) below {below}", *reasons[:3]]))
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# Runs of {', '.join(map(cell, folders))}"]

    def draw(figure: Figure | None, name: str, caption: str) -> None:
        if figure is not None:
            figure.savefig(out / f"{file_name(name)}.png", dpi=200)
            figure.savefig(out / f"{file_name(name)}.svg", metadata={"Date": None})
            parts.append(f"![{caption}]({file_name(name)}.png)\n\n*{caption}*")

    def listing(heading: str, lines: Sequence[str]) -> None:
        if lines:
            parts.append("\n".join([heading, "", *(f"- {text}" for text in lines)]))

    values, rows = run_values(runs, last), table(runs, last)
    with rc_context(RC):
        for data, own in runs.groupby("data"):
            parts.append(f"## {cell(data)}")
            for (metric, mode), arms in rows[rows.data == data].groupby(["metric", "mode"]):
                of_checkpoint = metric.startswith("checkpoint_")
                over = "of one checkpoint" if of_checkpoint else f"mean of the last {last} epochs"
                parts += [f"### {cell(metric)}, {over}", markdown(arms)]
                arms.to_csv(out / f"{file_name(f'{data} {metric}')}.csv", index=False)
                shown = own[own.folder.isin(values.folder[values.metric == metric])]
                figure = curves(shown, shown.monitor.iloc[0] if of_checkpoint else metric, mode)
                draw(figure, f"{data} {metric} curves", "Every seed, and their mean. The start may lie outside.")
            ends = own[~own.finished & ~own.trial].groupby("folder", sort=False).tail(1).itertuples()
            unfinished = [f"{cell(run.arm)}, seed {run.seed}: {run.epoch + 1} epochs" for run in ends]
            listing("Not finished, and in no table:", unfinished)
            for (monitor, mode), trials in own[own.trial].groupby(["monitor", "mode"]):
                name, caption = f"{data} {monitor} learning rates", f"Best {cell(monitor)} of each trial."
                draw(learning_rates(trials, monitor, mode), name, caption)
            for arm, figure in diagnostics(own):
                draw(figure, f"{data} {arm} diagnostics", f"{cell(arm)}: diagnostics of each layer.")
    listing("Left out:", reasons)
    (out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return "\n\n".join([*(part for part in parts[1:] if not part.startswith("![")), f"report: {out / 'report.md'}"])


def main(args: Sequence[str]) -> int:
    """Write the report."""
    parser = ArgumentParser("python -m lightning_danns.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUNS", help="folders; every run below is read")
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help="where to write (default: RUNS/report)")
    parser.add_argument("--last", type=int, default=5, metavar="EPOCHS", help="values are means of these (default: 5)")
    given = parser.parse_args(args)
    if given.last < 1:
        raise UsageError(f"--last {given.last}: it must be at least 1")
    print(write_report(given.runs, given.out or given.runs[0] / "report", given.last))
    return 0
