"""Runs that several processes train, each run once: an Optuna study whose waiting trials are the queue.

Any number of processes that see the storage may take trials from the queue. A process that trains says so every
`HEARTBEAT` seconds; a trial that is silent for `GRACE` seconds is put back into the queue, up to `RETRIES` times.
"""

import os
import random
import re
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
import torch
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError

from lightning_danns.errors import UsageError
from lightning_danns.study.settings import DEFAULTS

HEARTBEAT, GRACE, RETRIES = 20, 60, 3


def open_storage(folder: Path, url: str | None) -> RDBStorage:
    """The storage at ``url``, or ``folder/study.db``, made if there is none."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
    file: Any = {"timeout": 60, "isolation_level": None, "check_same_thread": False}
    opened = {"creator": lambda: sqlite3.connect(folder / "study.db", **file)}
    retry = RetryHeartbeatStaleTrialCallback(RETRIES, inherit_intermediate_values=True)
    beat: Any = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE, "heartbeat_stale_trial_callback": retry}
    for pause in (1, 1, 1, 1, 0):
        try:
            storage = RDBStorage(url or "sqlite:///study.db", {} if url else opened, **beat)
            break
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
            if not pause:
                raise UsageError(f"storage {url or folder / 'study.db'}: {error}") from error
            time.sleep(pause * random.random())  # another process makes it at this moment
    if url is None:  # SQLite has no SELECT FOR UPDATE, by which Optuna gives a trial to one process alone: lock first
        event.listen(storage.engine, "checkout", lambda connection, *_: connection.execute("BEGIN IMMEDIATE"))
    return storage


def fill(study: optuna.Study, runs: Mapping[str, Sequence[str]], again: bool) -> None:
    """Queue the runs (their names, and arguments of ``fit``) that no trial is for; ``again``: or none under way."""
    queued = names(study, TrialState.WAITING, TrialState.RUNNING) if again else names(study)
    for name, args in runs.items():
        if name not in queued:
            study.enqueue_trial({}, user_attrs={"run": name, "args": list(args)})


def names(study: optuna.Study, *states: TrialState) -> dict[str, int]:
    """Names of the runs that there are trials for in these states (default: in all), and the first trial's number."""
    trials = study.get_trials(deepcopy=False, states=states or None)
    return {trial.user_attrs["run"]: trial.number for trial in reversed(trials) if "run" in trial.user_attrs}


def described(params: Mapping[str, Any]) -> str:
    """Settings in a line."""
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def work(study: optuna.Study, train: Callable[[Trial], float]) -> None:
    """Train one run after the other, until the queue is empty and no process of a running trial is found dead."""

    def objective(trial: Trial) -> float:
        name = trial.user_attrs.get("run", "")
        # two commands that began at once may have queued a run twice, and another process may have emptied the queue
        if names(study, TrialState.WAITING, TrialState.RUNNING).get(name) != trial.number:
            raise optuna.TrialPruned
        try:
            return train(trial)
        except UsageError as error:
            trial.set_user_attr("ended", f"failed, {error}")
            raise
        except (KeyboardInterrupt, SystemExit) as end:  # Ctrl-C, SIGTERM: back into the queue
            RetryHeartbeatStaleTrialCallback(None, True)(study, study.get_trials()[trial.number])
            raise KeyboardInterrupt from end  # after which Optuna calls this try failed

    def tell(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.state == TrialState.COMPLETE or "ended" in trial.user_attrs:
            ended = trial.user_attrs.get("ended") or f"best {trial.value:.4f}"
            print(": ".join(filter(None, [trial.user_attrs["run"], described(trial.params), ended])), flush=True)

    last = time.monotonic()
    while time.monotonic() < last + 1.5 * GRACE:
        optuna.storages.fail_stale_trials(study)
        if names(study, TrialState.WAITING):
            study.optimize(objective, n_trials=1, catch=(UsageError,), callbacks=[tell])
            last = time.monotonic()
        elif names(study, TrialState.RUNNING):
            time.sleep(min(2, GRACE / 10))
        else:
            return


def several(room: str, args: Sequence[str], jobs: int) -> int:
    """The same command in ``jobs`` processes, which share the cores and the GPUs of this one; the worst exit status."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    command = [sys.executable, "-m", f"lightning_danns.{room}", *args, "--jobs=1"]
    shares = [environment | {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} for job in range(jobs)]
    return max(process.wait() for process in [subprocess.Popen(command, env=share) for share in shares])


def fit(args: Sequence[str], folder: Path, callbacks: Sequence[pl.Callback] = ()) -> None:
    """One fit, which starts or goes on in ``folder``, and writes ``log.txt`` there; a `UsageError` if it fails."""
    from lightning_danns.cli import main

    folder.mkdir(parents=True, exist_ok=True)
    log, kept = folder / "log.txt", os.dup(2)
    try:
        with open(log, "a", buffering=1, encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            os.dup2(file.fileno(), 2)  # where loggers write
            main(["fit", *DEFAULTS, *args, f"--run_dir={folder}", "--ckpt_path=last"], callbacks=callbacks)
    except SystemExit as end:
        if end.code != 2:
            raise
        said = re.findall("^error: (.*)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        raise UsageError(said[-1] if said else f"see {log}") from end
    except Exception as error:
        os.write(2, traceback.format_exc().encode())  # still the log
        raise UsageError(f"{type(error).__name__}: {error} (see {log})") from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
