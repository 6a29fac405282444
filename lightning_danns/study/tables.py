"""What a run's task is judged by, over its last epochs: of each run, and of each arm with an interval over seeds."""

import re
import zlib
from typing import Any

import pandas as pd
from scipy.stats import t


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
                rows.append(first | {"metric": metric, "value": end[metric].mean(), "epochs": end.epoch.max() + 1})
                break
    return pd.DataFrame(rows, columns=columns)


def table(runs: pd.DataFrame, last: int = 5) -> pd.DataFrame:
    """A row for each data set, metric and arm, the best first: mean of `run_values`, 95 % interval by Student's t."""
    arms = run_values(runs, last).groupby(["data", "metric", "mode", "arm"], as_index=False)
    told: Any = {name: (name, how) for name, how in (("lr", "first"), ("epochs", "min"), ("diverged", "sum"))}
    rows = arms.agg(runs=("value", "size"), value=("value", "mean"), error=("value", "sem"), **told)
    half = t.ppf(0.975, rows.runs - 1) * rows.error  # NaN of one run
    order = rows.value.where(rows["mode"] == "min", -rows.value)
    rows = rows.assign(low=rows.value - half, high=rows.value + half, order=order)
    rows = rows.sort_values(["data", "metric", "order"], ignore_index=True)
    return rows[["data", "metric", "mode", "arm", "runs", "value", "low", "high", "lr", "epochs", "diverged"]]


def markdown(rows: pd.DataFrame) -> str:
    """Rows of `table` as a Markdown table; a dash where there is no number."""
    head = f"| arm | runs | {cell(rows.metric.iloc[0])} | 95 % interval | learning rate | epochs | diverged |"
    lines = [head, "|---" + 6 * "|--:" + "|"]
    for row in rows.itertuples():
        interval = f"{row.low:.4f} to {row.high:.4f}" if row.runs > 1 else "-"
        rate = "-" if pd.isna(row.lr) else f"{row.lr:.4g}"
        ends = f"{rate} | {row.epochs} | {row.diverged or '-'}"
        lines.append(f"| {cell(row.arm)} | {row.runs} | {row.value:.4f} | {interval} | {ends} |")
    return "\n".join(lines)


def line(text: object) -> str:
    """A text that anybody may have chosen, whole, in a line of Markdown."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", " ".join(str(text).split()))


def cell(name: object) -> str:
    """A name that anybody may have chosen, shortened for a cell of a table."""
    return line(_short(name))


def label(name: object) -> str:
    """A name in a figure, whose font has Latin and Greek letters, and for which ``$`` begins a formula."""
    return re.sub(r"[^ -~\xa1-\u024f\u0370-\u03ff]", lambda m: ascii(m[0])[1:-1], _short(name)).replace("$", r"\$")


def file_name(name: str) -> str:
    """The name of a file: of differing names, differing ones."""
    return f"{re.sub('[^a-z0-9.+-]+', '_', name.lower()).strip('_')[:80]}_{zlib.crc32(name.encode()):08x}"


def _short(name: object) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= 80 else f"{text[:68]}... {zlib.crc32(text.encode()):08x}"
