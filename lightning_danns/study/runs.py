"""Run folders as one tidy table: a row for each run and epoch.

A run is a folder with ``metrics.csv``. Its **arm** is what it is averaged with: the folder above ``seed_N``, or else
the class of its model; of a fit without ``config.yaml``, its folder. No mean mixes settings, and no table mixes data:
runs of one arm that differ in more than their seed become arms of their own.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_danns.atomic import read_yaml
from lightning_danns.errors import UsageError
from lightning_danns.study.settings import finished, flat, result_of

SEED = ("data.order_seed", "data.test_each_epoch", "trainer.callbacks")  # settings that tell no arms apart
ONLOOKERS = re.compile(r"Diagnostics|Monitor|ProgressBar|Summary|Checkpoint|Timer|Stats")  # callbacks


def load_runs(*folders: str | Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """All runs below ``folders``, and the reason for each folder that had to be left out.

    ``finished``: nothing is left to train, or no ``config.yaml`` tells. ``diverged``: its last loss is no number.
    """
    tops = [Path(top).expanduser().resolve() for top in folders]
    root = Path(os.path.commonpath(tops))
    found: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for path in dict.fromkeys(path for top in tops for path in _candidates(top)):
        try:
            found.append(_run(path, root))
        except UsageError as reason:
            left_out[str(path)] = str(reason).replace(f"{path}{os.sep}", "")
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a value of another kind than a fit writes
            left_out[str(path)] = f"config.yaml or result.yaml is none of a fit ({type(error).__name__}: {error})"
    _name_arms(found)
    known = {run["monitor"]: run["mode"] for run in found if run["monitor"]} | {"val_loss": "min", "train_loss": "min"}
    frames, seen = [], set()
    for run in sorted(found, key=lambda run: (run["finished"], run["metrics"].index[-1]), reverse=True):
        if run["monitor"] is None:
            run["monitor"] = next((name for name in known if name in run["metrics"]), "val_loss")
            run["mode"] = known[run["monitor"]]
        same = (run["data"], run["arm"], run["seed"])
        if same in seen and run["seed"] is not None and not run["trial"]:
            left_out[run["folder"]] = f"arm {run['arm']} has another run with seed {run['seed']}, which got as far"
            continue
        seen.add(same)
        frames.append(run.pop("metrics").reset_index().assign(**run).drop(columns=["base", "settings"]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(), left_out


def _candidates(top: Path) -> list[Path]:
    """Folders that look like runs. Below a run, only what is a whole run itself; then that stands for the upper one."""
    if not top.is_dir():
        raise UsageError(f"{top}: there is no such folder")
    found: list[Path] = []
    for name, below, files in os.walk(top):
        below.sort()
        written = {"config.yaml", "metrics.csv"} & {*files} or any(file.startswith("events.out.") for file in files)
        if written and ("result.yaml" in files or not {*found} & {*Path(name).parents}):
            found.append(Path(name))
    upper = {parent for folder in found for parent in folder.parents}
    return [folder for folder in found if folder not in upper]


def _run(folder: Path, root: Path) -> dict[str, Any]:
    """What is known of one run, with its metrics; a `UsageError` says why it cannot be read."""
    known = (folder / "config.yaml").exists()
    config: dict[str, Any] = read_yaml(folder / "config.yaml") if known else {"trainer": {}}
    result, metrics, trial = result_of(folder), _metrics(folder), folder.parent.name == "trials"
    callbacks = config["trainer"].get("callbacks") or []
    callbacks = [c for c in (callbacks if isinstance(callbacks, list) else [callbacks]) if not ONLOOKERS.search(str(c))]
    settings = {key: value for key, value in flat(config).items() if key not in SEED} | {"callbacks": callbacks}
    rate, seed = settings.get("model.optimizer.lr"), config.get("seed_everything")
    if known and not trial:
        seeded = re.fullmatch(r"seed_\d+", folder.name)
        base = folder.parent.name if seeded else config["model"]["class_path"].rpartition(".")[2]
    else:
        place = folder.parent.parent if trial else folder
        base = place.name if place == root else str(place.relative_to(root))
    losses = metrics.get("train_loss", metrics.index.to_series())
    texts = {key: json.dumps(value, sort_keys=True, default=str) for key, value in settings.items()}
    run = {"folder": str(folder), "base": base, "trial": trial, "settings": texts, "metrics": metrics}
    run |= {"data": _data(settings) if known else "data unknown", "finished": finished(result) or not known}
    run |= {"monitor": result.get("monitor"), "mode": result.get("mode")}
    run |= {"seed": seed if isinstance(seed, int) else None, "lr": rate if rate is None else float(rate)}
    return run | {"diverged": losses.last_valid_index() != metrics.index[-1]}


def _metrics(folder: Path) -> pd.DataFrame:
    """One row for each epoch (the index). Of an epoch that is in several logs, the newest says what counts."""
    if not (folder / "metrics.csv").exists():
        raise UsageError("no metrics.csv: no epoch has ended, or its logger is another than CSVLogger")
    restarts = sorted(folder.glob("metrics-*.csv"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    logs = [log for log in map(_log, [*restarts, folder / "metrics.csv"]) if "epoch" in log and len(log)]
    metrics = pd.concat(logs).groupby("epoch").last() if logs else pd.DataFrame()
    if metrics.empty:
        raise UsageError("metrics.csv is empty: no epoch has ended")
    metrics.index = metrics.index.astype(int)
    tested = _log(folder / "test" / "metrics.csv").filter(regex="^test_").dropna()
    return metrics.assign(**{f"checkpoint_{name}": value for name, value in tested.tail(1).max().items()})


def _log(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path).apply(pd.to_numeric, errors="coerce")
    except (pd.errors.EmptyDataError, FileNotFoundError):
        return pd.DataFrame()
    except (OSError, ValueError) as error:  # pandas' ParserError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"{path.name} cannot be read: {' '.join(str(error).split())[:100]}") from error


def _data(settings: dict[str, Any]) -> str:
    """The data set and what was done to it."""
    given = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    name = given.pop("class_path").rpartition(".")[2].removesuffix("DataModule")
    what = [f"{key}={value}" for key, value in given.items() if key != "batch_size" and value is not None]
    return f"{name} ({', '.join(what)})" if what else name


def _name_arms(found: list[dict[str, Any]]) -> None:
    """The name of each run's arm: its base and, where runs of that base on the same data differ, in what."""
    for run in found:
        like = [r["settings"] for r in found if (r["base"], r["data"], r["trial"]) == (run["base"], run["data"], False)]
        differing = [key for key in run["settings"] if len({settings.get(key) for settings in like}) > 1]
        what = ", ".join(f"{key.rpartition('.')[2]}={run['settings'][key]}".replace('"', "") for key in differing)
        run["arm"] = f"{run['base']} ({what})" if what and not run["trial"] else run["base"]
