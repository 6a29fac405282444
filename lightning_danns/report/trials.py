"""How the trials of a sweep ended, from the ``trials.csv`` beside their folders."""

from pathlib import Path

import pandas as pd


def amend(runs: pd.DataFrame) -> pd.DataFrame:
    """Mark trials as their sweep does, and add those that diverged before an epoch had ended, with their lr alone."""
    added = []
    for sweep, trials in runs[runs.trial].groupby(runs.folder.map(lambda folder: Path(folder).parent.parent)):
        try:
            states = pd.read_csv(sweep / "trials.csv").set_index("number")
            rates = states[next(name for name in states if name.rpartition(".")[2] == "lr")]
        except (OSError, ValueError, KeyError, StopIteration):  # a sweep at its start, or of other settings
            continue
        for number, rate in rates[states.state == "diverged"].items():
            folder = str(sweep / "trials" / f"{number:04d}")
            runs.loc[runs.folder == folder, "diverged"] = True
            if folder not in set(trials.folder):
                constant = ["base", "data", "trial", "max_epochs", "settings"]
                nothing = {"lr": rate, "folder": folder, "finished": False, "diverged": True, "epoch": -1}
                added.append(trials.iloc[:1][constant].assign(**nothing))
    return pd.concat([runs, *added], ignore_index=True) if added else runs
