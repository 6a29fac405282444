"""Run folders as one tidy table: a row for each run and epoch.

A run is a folder with ``config.yaml`` and ``metrics.csv``. Its **arm** is what it is averaged with: the folder above
``seed_N`` (``RUNS/dann_mlp/seed_0``), or else the class of its model. Runs of one arm that differ in more than their
seed become arms of their own, named by what differs, so that no mean ever mixes two settings. Runs on differing
**data** do not even share a table.
"""

import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import yaml

from lightning_danns.errors import UsageError
from lightning_danns.report.trials import amend

SAME_DATA = {"data_dir", "num_workers", "order_seed", "test_each_epoch"}
"""Arguments of a data module that change neither images nor step: the order of the images is part of the seed."""

TRAINER = (
    *("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "devices", "num_nodes"),
    *("gradient_clip_algorithm", "overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches"),
)
"""Options of the Trainer that change what is learned or measured."""

ONLOOKERS = re.compile(r"Diagnostics|Monitor|ProgressBar|Summary|Checkpoint|Timer|Stats")
"""Callbacks that look on."""

FIRST = ["arm", "family", "seed", "lr", "data", "trial", "finished", "diverged", "max_epochs"]
METRICS = ["train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy"]


def load_runs(*folders: str | Path) -> pd.DataFrame:
    """All runs below ``folders``: a row for each run and epoch, with the run's settings and its metrics of that epoch.

    ``arm, seed, lr, data``: what is compared, see above; ``family`` is the arm whatever its learning rate. ``trial``:
    whether it is one of a sweep (``.../trials/0007``). ``finished``: whether it has all of ``max_epochs`` (or as many
    as EarlyStopping let it have) and its last checkpoint. ``diverged``: its training loss is no number.
    ``checkpoint_test_accuracy``: what the command ``test`` found. ``folder`` tells runs apart. ``epoch`` counts from
    0; ``train_loss, ..., LAYER/QUANTITY`` are metrics.

    Raises:
        UsageError: a folder does not exist.
    """
    return read(*folders)[0]


def read(*folders: str | Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """The runs, and what had to be left out: the reason for each folder."""
    frames: list[pd.DataFrame] = []
    omitted: dict[str, str] = {}
    for path in {path.resolve(): path for top in folders for path in _candidates(Path(top))}.values():
        try:
            frames += _read_run(path)
        except _Omitted as reason:
            omitted[str(path)] = str(reason)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a value where a fit writes another kind
            omitted[str(path)] = f"config.yaml is none of a fit ({type(error).__name__}: {error})"
    if not frames:
        return pd.DataFrame({name: [] for name in (*FIRST, "folder", "epoch", *METRICS)}), omitted
    runs = amend(pd.concat(frames, ignore_index=True))
    omitted = {folder: reason for folder, reason in omitted.items() if folder not in set(runs.folder)}
    for name in METRICS:
        if name not in runs:
            runs[name] = float("nan")
    runs["seed"] = runs.seed.astype("Int64")  # not 0.0 where another has none
    runs["arm"], runs["family"] = _arms(runs, set()), _arms(runs, {"lr"})
    for folder, twin in _twins(runs).items():
        omitted[folder] = f"seed and settings of {twin}, so it tells nothing new"
    runs = runs[~runs.folder.isin(omitted)].drop(columns=["base", "settings"]).reset_index(drop=True)
    return runs[[*FIRST, *runs.columns.difference(FIRST, sort=False)]], omitted


class _Omitted(Exception):  # noqa: N818
    """Why a folder is no run that can be read."""


def _candidates(top: Path) -> Iterator[Path]:
    if not top.is_dir():
        raise UsageError(f"{top}: there is no such folder")
    for folder, names, files in os.walk(top):
        names.sort()
        if "config.yaml" in files:
            yield Path(folder)
            if "metrics.csv" in files:
                names.clear()  # below a run is what its other commands wrote


def _read_run(folder: Path) -> list[pd.DataFrame]:
    """The run in ``folder``, or each of its replicas."""
    config = _config(folder)
    metrics = _metrics(folder)
    if not {"train_loss", "train_accuracy"} & {*metrics}:
        raise _Omitted("metrics.csv has neither train_loss nor train_accuracy: it is not of a fit")
    if _short(config["model"]["class_path"]) != "ReplicatedClassifier":
        return [_run(folder, config, metrics)]
    singles = sorted(folder.glob("replicas/*/config.yaml"), key=lambda path: int(path.parent.name))
    if not singles:
        raise _Omitted("many replicas, whose fit has not ended")
    of_one = [name for name in metrics if not re.search(r"/\d+$", name) and name not in METRICS]
    return [
        _run(path.parent, _config(path.parent), metrics[of_one].join(_replica(metrics, path.parent.name)))
        for path in singles
    ]


def _replica(metrics: pd.DataFrame, index: str) -> pd.DataFrame:
    """Its columns, without its number: ``val_accuracy/3`` is ``val_accuracy`` of replica 3."""
    return metrics.filter(regex=rf"/{index}$").rename(columns=lambda name: name.rpartition("/")[0])


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        _ = config["model"]["class_path"], config["data"]["class_path"], config["trainer"]["max_epochs"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _Omitted(f"config.yaml cannot be read: {' '.join(str(error).split())[:100]}") from error
    except (KeyError, TypeError) as error:
        raise _Omitted(f"config.yaml is none of a fit: it lacks {error}") from error
    return config


def _metrics(folder: Path) -> pd.DataFrame:
    """One row for each epoch (the index). Of an epoch that is in several logs, the newest says what counts."""
    restarts = sorted(folder.glob("metrics-*.csv"), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    metrics = pd.DataFrame()
    for path in [*restarts, folder / "metrics.csv"]:
        if not path.exists():
            raise _Omitted("no metrics.csv yet: no epoch has ended")
        try:
            log = pd.read_csv(path).apply(pd.to_numeric, errors="coerce")
        except pd.errors.EmptyDataError:
            continue
        except (OSError, ValueError) as error:  # pandas' ParserError and UnicodeDecodeError are ValueErrors
            raise _Omitted(f"{path.name} cannot be read: {' '.join(str(error).split())[:100]}") from error
        if "epoch" in log:
            metrics = log.dropna(subset="epoch").groupby("epoch").last().combine_first(metrics)
    if metrics.empty:
        raise _Omitted("metrics.csv is empty: no epoch has ended")
    metrics.index = metrics.index.astype(int).rename("epoch")
    return metrics


def _run(folder: Path, config: dict[str, Any], metrics: pd.DataFrame) -> pd.DataFrame:
    parent = folder.parent.name
    trial = parent == "trials"
    base = folder.parent.parent.name if trial else parent if re.fullmatch(r"seed_\d+", folder.name) else None
    seed = config.get("seed_everything")
    model, max_epochs, max_steps = config["model"], config["trainer"]["max_epochs"], config["trainer"].get("max_steps")
    losses = metrics["train_loss"].dropna() if "train_loss" in metrics else pd.Series(dtype=float)
    accuracies = metrics["train_accuracy"].dropna() if "train_accuracy" in metrics else losses
    done = int(max(accuracies.index, default=-1)) + 1
    limit = isinstance(max_epochs, int) and max_epochs > 0
    reached = done >= max_epochs if limit else "step" in metrics and metrics["step"].max() + 1 >= (max_steps or 0) > 0
    reached = reached or _stopped_early(folder, config)
    one_run = {
        "base": base or _short(model["class_path"]),
        "seed": seed if isinstance(seed, int) else None,
        "lr": _learning_rate(model),
        "data": _data(config["data"]),
        "trial": trial,
        "finished": bool(reached) and (trial or (folder / "checkpoints" / "last.ckpt").exists()),
        "diverged": bool(done) and (losses.empty or losses.index[-1] < done - 1),
        "max_epochs": max_epochs if limit else None,
        "folder": str(folder),
        "device": _device(folder),
        "checkpoint_test_accuracy": _tested(folder),
        "settings": json.dumps(_settings(config), sort_keys=True),
    }
    return metrics.reset_index().assign(**one_run)


def _stopped_early(folder: Path, config: dict[str, Any]) -> bool:
    if "EarlyStopping" not in str(config["trainer"].get("callbacks")):
        return False  # without reading the checkpoint, which may be large
    from lightning_danns.run_folder import last_checkpoint, stopped_early

    checkpoint = last_checkpoint(folder)
    return checkpoint is not None and stopped_early(checkpoint)


def _learning_rate(model: dict[str, Any]) -> float | None:
    optimizer = (model.get("init_args") or {}).get("optimizer")
    rate = (optimizer.get("init_args") or {}).get("lr") if isinstance(optimizer, dict) else None
    return None if rate is None else float(rate)  # YAML takes 1e-3 for text


def _data(data: dict[str, Any]) -> str:
    """The data set and what was done to it, but for how it is cut into batches."""
    given = data.get("init_args") or {}
    irrelevant = {*SAME_DATA, "batch_size", *(["split_seed"] if given.get("val_size") == 0 else [])}
    described = ", ".join(f"{k}={v}" for k, v in given.items() if k not in irrelevant and v is not None)
    name = _short(data["class_path"]).removesuffix("DataModule")
    return f"{name} ({described})" if described else name


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one arm must share: all that changes learning or measurement, but for the seed."""
    data = {name: value for name, value in (config["data"].get("init_args") or {}).items() if name not in SAME_DATA}
    callbacks = config["trainer"].get("callbacks") or []
    callbacks = [c for c in callbacks if not ONLOOKERS.search(c.get("class_path", ""))]
    trainer = {name: config["trainer"].get(name) for name in TRAINER}
    return dict(_flat({"model": config["model"], "data": data, "trainer": trainer, "callbacks": callbacks}))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, name if key == "init_args" else f"{name}.{key}")
    else:
        yield name, _short(value) if name.endswith("class_path") else value


def _arms(runs: pd.DataFrame, apart_from: set[str]) -> pd.Series:
    """The name of each row's arm: its base and, where runs or sweeps of that base differ, in what."""
    names = {}
    for (_, trial), group in runs.drop_duplicates("folder").groupby(["base", "trial"]):
        settings = {folder: json.loads(text) for folder, text in zip(group.folder, group.settings, strict=True)}
        owners = group.folder.map(lambda folder: str(Path(folder).parent)) if trial else group.folder
        # of runs on different data, only those on the same are compared
        compared = [
            [[settings[folder] for folder in one.folder] for _, one in same.groupby(owners)]
            for _, same in group.groupby("data")
        ]
        differing = [
            key
            for key in dict.fromkeys(key for one in settings.values() for key in one)
            if key.rpartition(".")[2] not in apart_from and any(_differs(key, owned) for owned in compared)
        ]
        for folder, base in zip(group.folder, group.base, strict=True):
            what = [f"{key.rpartition('.')[2]}={settings[folder].get(key)}" for key in differing]
            names[folder] = f"{base} ({', '.join(what)})" if what else base
    return runs.folder.map(names)


def _differs(key: str, owned: list[list[dict[str, Any]]]) -> bool:
    """Whether a setting tells runs, or sweeps with their trials, from each other. What a sweep searches does not."""
    values = [{json.dumps(settings.get(key)) for settings in one} for one in owned]
    return all(len(of_one) == 1 for of_one in values) and len(set.union(*values)) > 1


def _twins(runs: pd.DataFrame) -> dict[str, str]:
    """Folders of runs that an earlier one, or one that got further, makes superfluous, and which one does."""
    ends = runs[~runs.trial].groupby("folder", sort=False).tail(1)
    ends = ends.sort_values(["finished", "epoch"], ascending=False, kind="stable")
    twins: dict[str, str] = {}
    for _, same in ends.groupby(["data", "arm", "seed"], dropna=True):
        twins |= {folder: same.folder.iloc[0] for folder in same.folder.iloc[1:]}
    return twins


def _device(folder: Path) -> str | None:
    """What computed it, from ``environment.yaml``."""
    try:
        environment = yaml.safe_load((folder / "environment.yaml").read_text())
        return f"{environment['device']}, {environment['threads']} threads".replace(" 1 threads", " 1 thread")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None


def _tested(folder: Path) -> float | None:
    try:
        return float(pd.read_csv(folder / "test" / "metrics.csv")["test_accuracy"].dropna().iloc[-1])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def epoch_seconds(folder: str | Path) -> float | None:
    """Median time from the end of one epoch to that of the next, evaluation included, by the clock of its events.

    Only epochs that followed on each other in one process count, so that no pause between restarts does.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seconds: list[float] = []
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        try:
            events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
            times = [event.wall_time for event in events.Scalars("train_loss")]
        except (KeyError, OSError, ValueError):  # no epoch has ended, or a damaged file
            continue
        seconds += [later - earlier for earlier, later in pairwise(times)]
    return median(seconds) if seconds else None


def _short(class_path: Any) -> Any:
    return class_path.rpartition(".")[2] if isinstance(class_path, str) else class_path
