"""The trials of a sweep: which there are, who trains them, and which is best.

All that is known of a sweep is in its folder: Optuna's journal (``journal.log``), and a run folder for each trial.
Whoever sees the folder may take trials from there, one after the other.
"""

import csv
import io
import logging
import math
import os
import tempfile
import time
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_danns import workers
from lightning_danns.atomic import replacing
from lightning_danns.errors import DivergedError, UsageError
from lightning_danns.sweep.search_space import design, parse_axis

if TYPE_CHECKING:
    import optuna

TRIES = 3
"""How often a trial is tried whose process dies."""


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError('the search is Optuna\'s: pip install -e ".[study]"') from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


class Sweep:
    """A folder, what is searched there, and the arguments of ``train.py fit`` that all trials share."""

    def __init__(self, options: Namespace, fit_args: list[str]) -> None:
        self.axes = [parse_axis(text) for text in options.search]
        self.fit_args, self.trials, self.jobs = fit_args, options.trials, options.jobs
        self.monitor, self.mode, self.startup = options.monitor, options.mode, options.startup
        self.prune = not options.no_pruning
        self.folder: Path = options.folder
        keys = [axis.key for axis in self.axes]
        if len(set(keys)) < len(keys):
            raise UsageError(f"--search names a key twice: {', '.join(keys)}")
        for key in keys:
            if any(argument.partition("=")[0] == f"--{key}" for argument in fit_args):
                raise UsageError(f"--{key} is searched, so it cannot be given")
        if not self.monitor.startswith("val"):
            raise UsageError(f"--monitor {self.monitor}: selection is by held-out images only, val_loss or the like")
        if self.trials < 1 or self.startup < 0:
            raise UsageError(f"--trials {self.trials} --startup {self.startup}: there must be one trial or more")
        self.best_of: Callable[..., Any] = min if self.mode == "min" else max
        self.worst = math.inf if self.mode == "min" else -math.inf

    def settings(self) -> dict[str, Any]:
        """What must not change while a sweep goes on; configs by their content."""
        return {
            "search": [[*axis[:-1], list(axis.choices)] for axis in self.axes],
            "monitor": f"{self.mode} {self.monitor}",
            "pruning": self.prune,
            "arguments": self.fit_args,
            "configs": [config.read_text() for config in workers.configs(self.fit_args)],
        }

    def lock(self) -> Any:
        """Held while something is decided about the sweep as a whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return workers.lease(self.folder / "study.lock")

    def run_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}"

    def lock_of(self, number: int, lost: Callable[[], Any] | None = None) -> Any:
        """Held by the process that trains this trial."""
        return workers.lease(self.run_folder(number).with_suffix(".lock"), lost)

    def load(self) -> "optuna.Study":
        """The study. Its sampler is of this process: two with one seed would suggest the same."""
        optuna = _optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        seed = uuid.uuid4().int % 2**32
        path = str((self.folder / "journal.log").resolve())
        # not the default, whose symbolic link is never given up if it does not lead to the journal on this machine
        storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
        return optuna.create_study(
            study_name="sweep",
            storage=storage,
            load_if_exists=True,
            direction="minimize" if self.mode == "min" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup, constant_liar=True),
            pruner=optuna.pruners.MedianPruner() if self.prune else optuna.pruners.NopPruner(),
        )

    def arguments(self, params: dict[str, Any], run_dir: Path) -> list[str]:
        searched = [f"--{key}={value}" for key, value in params.items()]
        options = [*workers.QUIET, "--trainer.enable_checkpointing=false", f"--run_dir={run_dir}"]
        return ["fit", *self.fit_args, *searched, *options]


# ------------------------------------------------------------------------------------------------ how they are trained


def rehearse(sweep: Sweep) -> None:
    """One batch of training and validation with every choice, so that mistakes are found before anything is written."""
    for point in design(sweep.axes, max(1, *(len(axis.choices) for axis in sweep.axes))):
        with tempfile.TemporaryDirectory() as folder:
            _fit(sweep, [*sweep.arguments(point, Path(folder)), "--trainer.fast_dev_run=true"], None)


def work(sweep: Sweep) -> None:
    """Train one trial after the other, until the sweep has as many as it should."""
    import lightning_danns.cli  # noqa: F401  # which takes longer than anything else, before a trial's time begins

    study = sweep.load()
    locks: dict[int, Any] = {}
    while not finished(sweep, study):
        with sweep.lock():
            give_back_lost(sweep, study, locks)
            trial = ask(sweep, study, locks)
        if trial is None:
            time.sleep(2)  # others train the last ones; if they die, their trials are for us
            continue
        train(sweep, study, trial)
        locks.pop(trial.number).release()


def finished(sweep: Sweep, study: "optuna.Study") -> bool:
    return len(ended(study)) >= sweep.trials


def ended(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Those that count: not the tries that were given back."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.is_finished() and "given_back" not in trial.user_attrs]


def running(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    return study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.RUNNING,))


def ask(sweep: Sweep, study: "optuna.Study", locks: dict[int, Any]) -> "optuna.Trial | None":
    """The next trial, if there are not enough already. Its lock says that somebody is at it."""
    if len(ended(study)) + len(running(study)) >= sweep.trials:
        return None
    trial = study.ask()
    for axis in sweep.axes:
        axis.suggest(trial)
    lock = sweep.lock_of(trial.number, lost=lambda: os._exit(1))  # somebody else has given it back
    workers.taken(lock)
    locks[trial.number] = lock
    return trial


def give_back_lost(sweep: Sweep, study: "optuna.Study", locks: dict[int, Any]) -> None:
    """Trials whose process has died are tried again, as new ones with the same settings."""
    for trial in running(study):
        lock = locks.setdefault(trial.number, sweep.lock_of(trial.number))
        if workers.taken(lock):
            give_back(sweep, study, trial, tries=trial.user_attrs.get("tries", 1) + 1)
            locks.pop(trial.number).release()


def give_back(sweep: Sweep, study: "optuna.Study", trial: Any, tries: int) -> None:
    """End this try, and queue its settings for another one, unless it has been tried too often."""
    if tries <= TRIES:
        study._storage.set_trial_user_attr(trial._trial_id, "given_back", True)
        if len(trial.params) == len(sweep.axes):  # or else its process died before they were drawn
            study.enqueue_trial(dict(trial.params), user_attrs={"tries": tries})
    study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)


def train(sweep: Sweep, study: "optuna.Study", trial: "optuna.Trial") -> None:
    """One fit. Its value is the lowest of its epochs, as the weights kept as ``best`` are those of one epoch."""
    optuna = _optuna()
    begin = time.monotonic()
    outcome = _fit(sweep, sweep.arguments(trial.params, sweep.run_folder(trial.number)), trial, study)
    trial.set_user_attr("seconds", round(time.monotonic() - begin, 1))
    values = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    if outcome == "pruned":
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    elif outcome == "diverged":
        trial.set_user_attr("diverged", True)
        study.tell(trial, sweep.worst)  # not a failure: the sampler must learn from it
    elif not values:
        raise UsageError("the fit ended without a validation: nothing can be selected")
    else:
        study.tell(trial, sweep.best_of(values.values()))


def _fit(sweep: Sweep, args: list[str], trial: "optuna.Trial | None", study: Any = None) -> str:
    """How it ended: finished, pruned or diverged."""
    from lightning_danns.cli import main
    from lightning_danns.sweep.pruning import ReportToTrial

    report = ReportToTrial(sweep.monitor, trial)
    try:
        main(args, callbacks=[report])
    except SystemExit as exit:
        if isinstance(exit.__cause__, DivergedError):
            return "diverged"
        if trial is not None:
            give_back(sweep, study, trial, tries=trial.user_attrs.get("tries", 1))
        raise
    return report.outcome


# ---------------------------------------------------------------------------------------------------- what came of it


def described(params: dict[str, Any]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def row_of(sweep: Sweep, trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """What is known of a trial: its value is the best of its epochs, also if it was pruned."""
    values = trial.intermediate_values.values()
    diverged = "diverged" in trial.user_attrs
    return {
        "number": trial.number,
        "state": "diverged" if diverged else "failed" if trial.state.name == "FAIL" else trial.state.name.lower(),
        "value": sweep.best_of(values) if values and not diverged else None,
        **{axis.key: trial.params.get(axis.key) for axis in sweep.axes},
        "epochs": len(values),
        "seconds": trial.user_attrs.get("seconds"),
    }


def best_trial(sweep: Sweep, study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """The best of those that were trained to their end."""
    trained = [t for t in ended(study) if t.state.name == "COMPLETE" and t.value not in (None, sweep.worst)]
    return sweep.best_of(trained, key=lambda trial: trial.value, default=None)


def write_results(sweep: Sweep, study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """``trials.csv`` and ``best.yaml``; the best trial."""
    rows = [row_of(sweep, trial) for trial in ended(study)]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(sweep.folder / "trials.csv", table.getvalue())
    best = best_trial(sweep, study)
    if best is None:
        return None
    config = yaml.safe_load((sweep.run_folder(best.number) / "config.yaml").read_text())
    config |= {"run_dir": None, "ckpt_path": None}
    config["trainer"] |= dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"))
    counts = Counter(row["state"] for row in rows)
    head = (
        f"# Found by a search of {len(rows)} trials ({', '.join(f'{n} {state}' for state, n in counts.items())}) over "
        f"{', '.join(map(str, sweep.axes))}: trial {best.number}, {described(best.params)}.\n"
        f"#   python train.py fit --config {sweep.folder / 'best.yaml'}\n"
        f"# Expect: {sweep.monitor} {best.value:.4f} in the best of {len(best.intermediate_values)} epochs "
        f"(seed {config['seed_everything']}).\n"
    )
    _write(sweep.folder / "best.yaml", head + yaml.safe_dump(config, sort_keys=False))
    return best


def _write(path: Path, text: str) -> None:
    with replacing(path, partial=f".{path.name}.{uuid.uuid4().hex}") as file:
        file.write(text.encode())
