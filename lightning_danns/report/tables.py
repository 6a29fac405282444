"""Errors of the last epochs: of each run, and of each arm with an interval over its seeds."""

import math

import pandas as pd
from scipy.stats import t

ERRORS = {
    "test_accuracy": "test error",
    "checkpoint_test_accuracy": "test error of one checkpoint",
    "val_accuracy": "validation error",
}
"""Where a run's error is from, best first; a run's is the first that it has."""


def run_errors(runs: pd.DataFrame, last: int = 5) -> pd.DataFrame:
    """A row for each finished run: its error in percent, the mean of those of its last epochs, and of what it is one.

    Sweeps' trials are left out. ``epochs``: how many epochs the mean is over; 0 if it is that of a checkpoint.
    """
    rows = []
    kept = ["data", "arm", "family", "seed", "lr", "max_epochs", "diverged", "device"]
    for folder, run in runs[runs.finished & ~runs.trial].groupby("folder", sort=False):
        end = run[run.epoch > run.epoch.max() - last]
        for name, error_of in ERRORS.items():
            values = end[name].dropna() if name in end else end.epoch[:0]
            if len(values):
                epochs = 0 if name.startswith("checkpoint") else len(values)
                of_run = {"error_of": error_of, "error": 100 * (1 - values.mean()), "epochs": epochs, "folder": folder}
                rows.append({**run.iloc[0][kept], **of_run})
                break
    return pd.DataFrame(rows, columns=[*kept, "error_of", "error", "epochs", "folder"])


def table(runs: pd.DataFrame, last: int = 5) -> pd.DataFrame:
    """A row for each data set, kind of error and arm, the best first in each.

    ``error``: in percent, mean over the seeds of each seed's mean over the ``last`` epochs; ``low, high``: its 95 %
    interval, by Student's t over the seeds (none of one seed); ``lr``: the learning rate; ``seconds``: of an epoch.
    """
    # imported here: it reads event files, which not every table of errors needs
    from lightning_danns.report.runs import epoch_seconds

    errors = run_errors(runs, last)
    errors["seconds"] = pd.to_numeric(errors.folder.map(epoch_seconds))
    rows = []
    for (data, error_of, arm), seeds in errors.groupby(["data", "error_of", "arm"]):
        n, mean = len(seeds), seeds.error.mean()
        half = t.ppf(0.975, n - 1) * seeds.error.std() / math.sqrt(n) if n > 1 else math.nan
        rows.append([data, error_of, arm, n, mean, mean - half, mean + half, seeds.lr.iloc[0], seeds.seconds.mean()])
    columns = ["data", "error_of", "arm", "runs", "error", "low", "high", "lr", "seconds"]
    return pd.DataFrame(rows, columns=columns).sort_values(["data", "error_of", "error"], ignore_index=True)


def markdown(rows: pd.DataFrame) -> str:
    """Rows of `table` as a Markdown table; a dash where there is no number."""
    lines = [
        "| arm | runs | error % | 95 % interval | learning rate | s / epoch |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows.itertuples():
        interval = f"{row.low:.2f} to {row.high:.2f}" if row.runs > 1 else "-"
        numbers = [number(row.error, ".2f"), interval, number(row.lr, ".4g"), number(row.seconds, ".1f")]
        lines.append(f"| {row.arm} | {row.runs} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def number(value: float | None, form: str) -> str:
    return "-" if value is None or pd.isna(value) else format(value, form)


def remarks(errors: pd.DataFrame, last: int) -> list[str]:
    """What a reader of the table must know of its runs (rows of `run_errors`)."""
    said = []
    lengths = errors.groupby("arm").max_epochs.first()
    if lengths.nunique() > 1:
        said.append("epochs of training: " + ", ".join(f"{arm} {number(n, '.0f')}" for arm, n in lengths.items()))
    for arm, runs in errors[errors.diverged].groupby("arm"):
        said.append(f"{arm}, {_seeds(runs)}: training loss is no number (it has diverged)")
    for (arm, epochs), runs in errors[errors.epochs.between(1, last - 1)].groupby(["arm", "epochs"]):
        said.append(f"{arm}, {_seeds(runs)}: mean of {epochs} epochs, all that there are")
    return said


def unfinished(runs: pd.DataFrame) -> list[str]:
    """How far each run is that is not finished, and so in no table."""
    said = []
    for _, run in runs[~runs.finished & ~runs.trial].groupby("folder", sort=False):
        first = run.iloc[0]
        of = "" if pd.isna(first.max_epochs) else f" of {first.max_epochs:.0f}"
        said.append(f"{first.arm}, seed {first.seed}: {run.epoch.max() + 1}{of} epochs")
    return said


def _seeds(errors: pd.DataFrame) -> str:
    return ("seed " if len(errors) == 1 else "seeds ") + ", ".join(map(str, errors.seed))
