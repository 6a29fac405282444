"""Search of settings for the best value of what the task monitors: ``python -m lightning_danns.sweep --help``."""

import json
import math
import shlex
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytorch_lightning as pl
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from lightning_danns.errors import DivergedError, UsageError
from lightning_danns.study import queue
from lightning_danns.study.settings import differences, parse, read_yaml, result_of, settings_of, user_path

KINDS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A,B,... (YAML, as in choice:[10,20],[10,30])"

Axis = FloatDistribution | IntDistribution | CategoricalDistribution


def parse_axis(text: str) -> tuple[str, Axis]:
    """The key and the values that ``--search`` names; choices as text for ``fit``."""
    key, _, space = text.removeprefix("--").partition("=")
    kind, _, rest = space.partition(":")
    try:
        if key and kind == "choice":
            choices = [c if isinstance(c, str) else json.dumps(c) for c in yaml.safe_load(f"[{rest}]")]
            if len(set(choices)) < max(2, len(choices)):
                raise ValueError("there must be two choices or more, all different")
            return key, CategoricalDistribution(choices)
        number = int if kind == "int" else float
        low, high = (number(end) for end in rest.split(":"))
        if not (key and kind in ("log", "uniform", "int") and math.isfinite(high - low) and low < high):
            raise ValueError("the low end must be below the high end")
        return key, IntDistribution(int(low), int(high)) if kind == "int" else FloatDistribution(
            low, high, kind == "log"
        )
    except (TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--search {text}: it must be KEY= and one of {KINDS}: {reason}") from error


def suggest(trial: Trial, key: str, axis: Axis) -> Any:
    """A value of the axis for this trial."""
    if isinstance(axis, CategoricalDistribution):
        return trial.suggest_categorical(key, axis.choices)
    if isinstance(axis, IntDistribution):
        return trial.suggest_int(key, axis.low, axis.high)
    return trial.suggest_float(key, axis.low, axis.high, log=axis.log)


class TrialReport(pl.Callback):
    """Reports each epoch's validation to an Optuna trial, and ends the fit where the trial is hopeless.

    Without a trial, it ends the fit after one batch and its validation. ``outcome`` is then None if there was none.
    """

    def __init__(self, trial: Trial | None = None, monitor: str = "") -> None:
        self.trial, self.monitor = trial, monitor
        self.outcome: str | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop |= self.trial is None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" not in name}
        if seen := [name for name in metrics if name.startswith("test")]:
            raise UsageError(f"{seen[0]} is logged while training: a search must not see the test data")
        if trainer.sanity_checking:
            return
        self.outcome = "validated"
        if self.trial is None:
            return
        if self.monitor not in metrics:
            raise UsageError(f"no {self.monitor} is logged, but {', '.join(metrics) or 'nothing'}")
        if not all(math.isfinite(v) for name, v in metrics.items() if name == self.monitor or name.endswith("_loss")):
            self.outcome = "diverged"
        else:
            self.trial.report(metrics[self.monitor], trainer.current_epoch)
            self.outcome = "pruned" if self.trial.should_prune() else self.outcome
        trainer.should_stop |= self.outcome != "validated"

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.outcome = "diverged" if isinstance(exception, DivergedError) else self.outcome


class Search:
    """A folder, what is searched there, and the arguments of ``fit`` that all trials share."""

    def __init__(self, options: Any, fit_args: list[str]) -> None:
        self.options, self.fit_args, self.folder = options, fit_args, options.folder
        self.axes = dict(map(parse_axis, options.search))
        if len(self.axes) < len(options.search):
            raise UsageError(f"--search names a key twice: {', '.join(options.search)}")
        for option in (argument.partition("=")[0] for argument in fit_args):
            if option.removeprefix("--") in self.axes:
                raise UsageError(f"{option} is searched, so it cannot be given")
        if options.trials < 1:
            raise UsageError(f"--trials {options.trials}: there must be one trial or more")
        values = [a.choices if isinstance(a, CategoricalDistribution) else [a.low] for a in self.axes.values()]
        rounds = [[of_one[k % len(of_one)] for of_one in values] for k in range(max(map(len, values)))]
        self.examples = [self.arguments(dict(zip(self.axes, point, strict=True))) for point in rounds]
        search = {key: str(axis) for key, axis in self.axes.items()}
        self.settings: dict[str, Any] = {"search": search, "pruning": not options.no_pruning, "fit": settings_of(self.examples[0])}

    def arguments(self, params: dict[str, Any]) -> list[str]:
        """Of ``fit``, with these values of the axes."""
        return [*self.fit_args, *(f"--{key}={value}" for key, value in params.items())]

    def open(self) -> optuna.Study:
        """The study, made after a rehearsal if there is none; a `UsageError` if there is one of other settings."""
        url, name = self.options.storage, str(self.folder) if self.options.storage else "sweep"
        storage = queue.open_storage(self.folder, url) if url or (self.folder / "study.db").exists() else None
        if storage is None or name not in optuna.get_all_study_names(storage):
            monitor, mode = self.rehearse()
            storage = storage or queue.open_storage(self.folder, url)
            direction = optuna.study.StudyDirection.MINIMIZE if mode == "min" else optuna.study.StudyDirection.MAXIMIZE
            study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
            study.set_user_attr("monitor", monitor)
            study.set_user_attr("settings", self.settings)
        sampler = optuna.samplers.TPESampler(constant_liar=True)  # without a seed: two processes would suggest the same
        warmup = max(self.settings["fit"]["trainer"]["max_epochs"] or 0, 0) // 3  # small rates are behind at first
        median = optuna.pruners.MedianPruner(n_warmup_steps=warmup)
        pruner = optuna.pruners.NopPruner() if self.options.no_pruning else median
        study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        earlier, now = study.user_attrs["settings"], self.settings
        changed = [(key, earlier[key], now[key]) for key in ("search", "pruning") if earlier[key] != now[key]]
        for key, old, new in [*changed, *differences(earlier["fit"], now["fit"])]:
            raise UsageError(f"{self.folder} holds a sweep with {key}={old}, not {new}: give another --folder")
        return study

    def rehearse(self) -> tuple[str, str]:
        """Train one batch with every choice, before anything is written; what is monitored, and its better end."""
        for example in self.examples:
            with tempfile.TemporaryDirectory() as temporary:
                probe = TrialReport()
                try:
                    queue.fit(example, Path(temporary), [probe])
                except queue.FailedRun as error:
                    raise UsageError(str(error)) from error
                result = result_of(Path(temporary))
            monitor = str(result.get("monitor"))
            if probe.outcome is None or not monitor.startswith("val"):
                said = "there is no validation" if probe.outcome is None else f"the task monitors {monitor}"
                raise UsageError(f"{said}: a search selects by held-out data, so hold some out (--data.val_size)")
        return monitor, result["mode"]

    def train(self, study: optuna.Study, trial: Trial) -> float:
        """One fit; its value is the best of its epochs, as ``best.ckpt`` is from one epoch."""
        params = {key: suggest(trial, key, axis) for key, axis in self.axes.items()}
        report, folder = (
            TrialReport(trial, study.user_attrs["monitor"]),
            self.folder / "trials" / trial.user_attrs["run"],
        )
        try:
            queue.fit(self.arguments(params), folder, [report])
        except queue.FailedRun:
            if report.outcome != "diverged":
                raise
        if report.outcome in ("pruned", "diverged"):
            trial.set_user_attr("note", report.outcome)
            raise optuna.TrialPruned  # the sampler takes these for worse than all others
        return float(result_of(folder)["best"])

    def write_results(self, study: optuna.Study) -> FrozenTrial | None:
        """``trials.csv`` and ``best.yaml``; the best of the trials that were trained to their end."""
        rows = [row_of(trial) for trial in ended(study)]
        pd.DataFrame(rows).to_csv(self.folder / "trials.csv", index=False)
        if not queue.trials(study, TrialState.COMPLETE):
            return None
        best, path = study.best_trial, self.folder / "best.yaml"
        config = read_yaml(self.folder / "trials" / best.user_attrs["run"] / "config.yaml")
        config |= {"run_dir": None, "ckpt_path": None}
        for option in ("enable_progress_bar", "enable_model_summary", "devices"):
            config["trainer"].pop(option, None)
        head = (
            f"# Found by a search of {len(rows)} trials: {described(best.params)}.\n#   {command_for(path)}\n"
            f"# Expect: {study.user_attrs['monitor']} {best.value:.4f} in the best epoch "
            f"(trial {best.user_attrs['run']}, seed {config.get('seed_everything')}).\n"
        )
        path.write_text(head + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return best


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count, not those that were put back into the queue: the last of each run."""
    last = {trial.user_attrs["run"]: trial for trial in queue.trials(study) if trial.params}
    return [trial for trial in last.values() if trial.state.is_finished()]


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """What ``trials.csv`` says of a trial."""
    state = trial.user_attrs.get("note") or trial.state.name.lower()
    value = trial.value if trial.state == TrialState.COMPLETE else None
    seconds = trial.duration and round(trial.duration.total_seconds(), 1)
    told = {"epochs": len(trial.intermediate_values), "seconds": seconds, "error": trial.user_attrs.get("error")}
    return {"run": trial.user_attrs["run"], "state": state, "value": value, **trial.params, **told}


def described(params: dict[str, Any]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def command_for(config: Path) -> str:
    return shlex.join(["python", "-m", "lightning_danns", "fit", "--config", str(config)])


def main(args: Sequence[str]) -> int:
    """Search; returns the exit status: 1 if no trial was trained to its end."""
    about = (
        "Searches config keys for the best value of what the task monitors on held-out data. Options that are not "
        "listed here are those of fit, for all trials. The same command goes on, or helps from another terminal."
    )
    parser = ArgumentParser("python -m lightning_danns.sweep", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--search", action="append", required=True, metavar="KEY=SPACE", help=f"{KINDS}; repeat for several keys")
    add("--folder", type=user_path, required=True, help="of the sweep, e.g. sweeps/layernorm")
    add("--trials", type=int, default=20, help="how many, of all processes together (default: 20)")
    add("--no_pruning", action="store_true", help="train hopeless trials to their end, too")
    queue.add_options(parser)
    options, fit_args = parse(parser, args)
    search = Search(options, fit_args)
    study = search.open()
    monitor = study.user_attrs["monitor"]

    def tell(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.params:
            row = row_of(trial)
            value = row["error"] or (row["state"] if row["value"] is None else f"{monitor} {row['value']:.4f}")
            print(
                f"[{len(ended(study))}/{options.trials}] {row['run']}: {described(trial.params)}: {value}", flush=True
            )

    if not options.worker:
        queue.fill(study, {f"{k:04d}": [] for k in range(options.trials)}, again=False)
    queue.run(study, lambda trial: search.train(study, trial), tell, "sweep", args, options)
    if options.worker:
        return 0
    best = search.write_results(study)
    print(f"\nall trials: {options.folder / 'trials.csv'}")
    if best is None:
        print("no trial was trained to its end: search another range")
        return 1
    print(f"best: {best.user_attrs['run']}, {described(best.params)}: {monitor} {best.value:.4f}")
    print(f"train it:  {command_for(options.folder / 'best.yaml')}")
    return 0
