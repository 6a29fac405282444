"""What a run's task is judged by, over its last epochs: of each run, and of each arm with an interval over seeds."""

import math

import pandas as pd
from scipy.stats import t

from lightning_danns.study.text import cell


def run_values(runs: pd.DataFrame, last: int = 5) -> pd.DataFrame:
    """A row for each finished run that is no trial: its value, the mean over its last epochs, and of which metric.

    The metric is the test data's, each epoch's or else one checkpoint's, if there is any, or else the monitored one.
    """
    columns = ["data", "metric", "mode", "arm", "seed", "lr", "value", "epochs", "diverged", "folder"]
    rows = []
    for _, run in runs[runs.finished & ~runs.trial].groupby("folder", sort=False) if len(runs) else ():
        first, end = run.iloc[0].to_dict(), run[run.epoch > run.epoch.max() - last]
        quantity = first["monitor"].partition("_")[2]
        for metric in (f"test_{quantity}", f"checkpoint_test_{quantity}", first["monitor"]):
            if metric in end and end[metric].notna().any():
                rows.append(first | {"metric": metric, "value": end[metric].mean(), "epochs": end[metric].count()})
                break
    return pd.DataFrame(rows, columns=columns)


def table(runs: pd.DataFrame, last: int = 5) -> pd.DataFrame:
    """A row for each data set, metric and arm, the best first in each.

    ``value``: mean over the seeds of each seed's mean over the ``last`` epochs; ``low, high``: its 95 % interval, by
    Student's t over the seeds (none of one seed); ``lr``: the learning rate.
    """
    arms = run_values(runs, last).groupby(["data", "metric", "mode", "arm"], as_index=False)
    rows = arms.agg(runs=("value", "size"), value=("value", "mean"), std=("value", "std"), lr=("lr", "first"))
    half = t.ppf(0.975, rows.runs - 1) * rows["std"] / rows.runs.map(math.sqrt)  # NaN of one run
    rows = rows.assign(low=rows.value - half, high=rows.value + half, order=rows.value)
    rows.loc[rows["mode"] == "max", "order"] *= -1
    rows = rows.sort_values(["data", "metric", "order"], ignore_index=True)
    return rows[["data", "metric", "mode", "arm", "runs", "value", "low", "high", "lr"]]


def markdown(rows: pd.DataFrame) -> str:
    """Rows of `table` as a Markdown table; a dash where there is no number."""
    lines = [f"| arm | runs | {cell(rows.metric.iloc[0])} | 95 % interval | learning rate |", "|---|--:|--:|--:|--:|"]
    for row in rows.itertuples():
        interval = f"{row.low:.4f} to {row.high:.4f}" if row.runs > 1 else "-"
        rate = "-" if pd.isna(row.lr) else f"{row.lr:.4g}"
        lines.append(f"| {cell(row.arm)} | {row.runs} | {row.value:.4f} | {interval} | {rate} |")
    return "\n".join(lines)


def remarks(values: pd.DataFrame, last: int) -> list[str]:
    """What a reader of the table must know of its runs (rows of `run_values`)."""
    said = []
    for row in values.itertuples():
        few = row.epochs < last and not row.metric.startswith("checkpoint_")
        what = ["its last training loss is no number"] * row.diverged + [f"mean of {row.epochs} epochs"] * few
        if what:
            said.append(f"{cell(row.arm)}, seed {row.seed}: {', '.join(what)}")
    return said
