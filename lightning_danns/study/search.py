"""Searches config keys for the best value of what the task monitors on held-out data.

Options not listed here are those of fit, for all trials. The same command goes on, or helps from another terminal.
"""

import json
import math
import shlex
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytorch_lightning as pl
import yaml
from optuna.trial import Trial

from lightning_danns.atomic import read_yaml
from lightning_danns.errors import UsageError
from lightning_danns.study import queue
from lightning_danns.study.settings import differences, parse, result_of, settings_of, user_path

KINDS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A,B,... (YAML, as in choice:[10,20],[10,30])"


def parse_axis(text: str) -> tuple[str, dict[str, Any]]:
    """The key that ``--search`` names, and its values: arguments of `suggest`, choices as text for ``fit``."""
    key, _, space = text.removeprefix("--").partition("=")
    kind, _, rest = space.partition(":")
    try:
        if key and kind == "choice":
            choices = [c if isinstance(c, str) else json.dumps(c) for c in yaml.safe_load(f"[{rest}]")]
            if len(set(choices)) < max(2, len(choices)):
                raise ValueError("there must be two choices or more, all different")
            return key, {"choices": choices}
        low, high = (int(end) if kind == "int" else float(end) for end in rest.split(":"))
        least = 0 if kind == "log" else -math.inf
        if not (key and kind in ("log", "uniform", "int") and math.isfinite(high - low) and least < low < high):
            raise ValueError("the low end must be below the high end, and above 0 on a logarithmic scale")
        return key, {"low": low, "high": high} | ({} if kind == "int" else {"log": kind == "log"})
    except (TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--search {text}: it must be KEY= and one of {KINDS}: {reason}") from error


def suggest(trial: Trial, key: str, values: dict[str, Any]) -> Any:
    """A value of the axis for this trial."""
    if "choices" in values:
        return trial.suggest_categorical(key, **values)
    return trial.suggest_float(key, **values) if "log" in values else trial.suggest_int(key, **values)


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
        losses = [value for name, value in metrics.items() if name == self.monitor or name.endswith("_loss")]
        if not all(map(math.isfinite, losses)):
            raise UsageError("it has diverged: a loss is no number")
        self.trial.report(metrics[self.monitor], trainer.current_epoch)
        if self.trial.should_prune():
            self.outcome, trainer.should_stop = "pruned", True


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
        values = {key: axis.get("choices", [axis.get("low")]) for key, axis in self.axes.items()}
        rounds = range(max(map(len, values.values())))
        self.examples = [self.arguments({key: v[k % len(v)] for key, v in values.items()}) for k in rounds]
        self.settings = settings_of(self.examples[0]) | {"search": self.axes, "pruning": not options.no_pruning}

    def arguments(self, params: dict[str, Any]) -> list[str]:
        """Of ``fit``, with these values of the axes."""
        return [*self.fit_args, *(f"--{key}={value}" for key, value in params.items())]

    def open(self) -> optuna.Study:
        """The study, made after a rehearsal if there is none; a `UsageError` if there is one of other settings."""
        url, name = self.options.storage, str(self.folder) if self.options.storage else "sweep"
        storage = queue.open_storage(self.folder, url) if url or (self.folder / "study.db").exists() else None
        known = storage is not None and name in optuna.get_all_study_names(storage)
        monitor, mode = ("", "") if known else self.rehearse()
        warmup = max(self.settings["trainer"]["max_epochs"] or 0, 0) // 3  # small rates are behind at first
        median = optuna.pruners.MedianPruner(n_warmup_steps=warmup)
        study = optuna.create_study(
            storage=storage or queue.open_storage(self.folder, url),
            study_name=name,
            direction="minimize" if mode == "min" else "maximize",
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(constant_liar=True),  # without a seed: two would suggest the same
            pruner=optuna.pruners.NopPruner() if self.options.no_pruning else median,
        )
        if not known:
            study.set_user_attr("monitor", monitor)
            study.set_user_attr("settings", self.settings)
        for key, old, new in differences(study.user_attrs["settings"], self.settings):
            raise UsageError(f"{self.folder} holds a sweep with {key}={old}, not {new}: give another --folder")
        return study

    def rehearse(self) -> tuple[str, str]:
        """Train one batch with every choice, before anything is written; what is monitored, and its better end."""
        for example in self.examples:
            with tempfile.TemporaryDirectory() as temporary:
                probe = TrialReport()
                queue.fit(example, Path(temporary), [probe])
                result = result_of(Path(temporary))
            monitor = str(result.get("monitor"))
            if probe.outcome is None or result.get("best") is None or not monitor.startswith("val"):
                raise UsageError(f"there is no validation of {monitor}: hold some data out (--data.val_size)")
        return monitor, result["mode"]

    def train(self, study: optuna.Study, trial: Trial) -> float:
        """One fit; its value is the best of its epochs, as ``best.ckpt`` is from one epoch."""
        params = {key: suggest(trial, key, axis) for key, axis in self.axes.items()}
        report, folder = TrialReport(trial, study.user_attrs["monitor"]), self.folder / "trials"
        queue.fit(self.arguments(params), folder / trial.user_attrs["run"], [report])
        if report.outcome == "pruned":
            trial.set_user_attr("ended", "pruned")
            raise optuna.TrialPruned
        best = result_of(folder / trial.user_attrs["run"]).get("best")
        if best is None or not math.isfinite(best):
            raise UsageError(f"its best {report.monitor} is {best}")
        return float(best)

    def results(self, study: optuna.Study) -> str:
        """Write ``trials.csv`` and ``best.yaml``; what is to be said of them."""
        table = study.trials_dataframe(attrs=("state", "value", "params", "duration", "user_attrs"))
        table = table[table.user_attrs_run.notna() & table.state.isin(["COMPLETE", "PRUNED", "FAIL"])]
        table.columns = [name.removeprefix("params_").removeprefix("user_attrs_") for name in table.columns]
        table.drop(columns="args").to_csv(self.folder / "trials.csv", index=False)
        if not (table.state == "COMPLETE").any():
            raise UsageError(f"no trial was trained to its end ({self.folder / 'trials.csv'}): search another range")
        best, path = study.best_trial, self.folder / "best.yaml"
        run, value = best.user_attrs["run"], f"{study.user_attrs['monitor']} {best.value:.4f}"
        config = read_yaml(self.folder / "trials" / run / "config.yaml") | {"run_dir": None, "ckpt_path": None}
        for option in ("enable_progress_bar", "enable_model_summary", "devices"):
            config["trainer"].pop(option, None)
        command = shlex.join(["python", "-m", "lightning_danns", "fit", "--config", str(path)])
        found = f"trial {run} of {len(set(table.run))}, {queue.described(best.params)}"
        head = f"# Found by a search: {found}.\n#   {command}\n# Expect: {value} in the best epoch.\n"
        path.write_text(head + yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return f"\nall trials: {self.folder / 'trials.csv'}\nbest: {found}: {value}\ntrain it:  {command}"


def main(args: Sequence[str]) -> int:
    """Search, or go on with it."""
    parser = ArgumentParser("python -m lightning_danns.sweep", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--search", action="append", required=True, metavar="KEY=SPACE", help=f"{KINDS}; repeat for several keys")
    add("--folder", type=user_path, required=True, help="of the sweep, e.g. sweeps/layernorm")
    add("--trials", type=int, default=20, help="how many, of all processes together (default: 20)")
    add("--no_pruning", action="store_true", help="train hopeless trials to their end, too")
    search = Search(*parse(parser, args))
    study = search.open()
    queue.fill(study, {f"{k:04d}": [] for k in range(search.options.trials)}, again=False)
    if search.options.jobs > 1:
        return queue.several("sweep", args, search.options.jobs)
    queue.work(study, lambda trial: search.train(study, trial))
    print(search.results(study))
    return 0
