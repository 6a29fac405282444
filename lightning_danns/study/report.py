"""The folder of a report: tables (Markdown, CSV) and figures (PNG, SVG), all in report.md."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from lightning_danns.errors import UsageError
from lightning_danns.study import figures
from lightning_danns.study.runs import load_runs
from lightning_danns.study.settings import user_path
from lightning_danns.study.tables import cell, file_name, markdown, run_values, table


def write_report(folders: Sequence[Path], out: Path, last: int = 5) -> str:
    """Write the report of all runs below ``folders`` into ``out``; its tables, and where it is."""
    runs, left_out = load_runs(*folders)
    reasons = [f"{cell(folder)}: {cell(reason)}" for folder, reason in left_out.items()]
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
            parts.append("\n".join([heading, "", *(f"- {line}" for line in lines)]))

    values, rows = run_values(runs, last), table(runs, last)
    with rc_context(figures.RC):
        for data, own in runs.groupby("data"):
            parts.append(f"## {cell(data)}")
            for (metric, mode), arms in rows[rows.data == data].groupby(["metric", "mode"]):
                of = values[(values.data == data) & (values.metric == metric)]
                over = "of one checkpoint" if metric.startswith("checkpoint_") else f"mean of the last {last} epochs"
                parts += [f"### {cell(metric)}, {over}", markdown(arms)]
                arms.to_csv(out / f"{file_name(f'{data} {metric}')}.csv", index=False)
                shown = own[own.folder.isin(of.folder)]
                caption = "Every seed, and their mean. Early epochs may lie outside."
                draw(figures.curves(shown, metric, mode), f"{data} {metric} curves", caption)
            ends = own[~own.finished & ~own.trial].groupby("folder", sort=False).tail(1).itertuples()
            unfinished = [f"{cell(run.arm)}, seed {run.seed}: {run.epoch + 1} epochs" for run in ends]
            listing("Not finished, and in no table:", unfinished)
            for (monitor, mode), trials in own[own.trial].groupby(["monitor", "mode"]):
                name, caption = f"{data} {monitor} learning rates", f"Best {cell(monitor)} of each trial."
                draw(figures.learning_rates(trials, monitor, mode), name, caption)
            for arm, figure in figures.diagnostics(own):
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
