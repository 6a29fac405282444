"""Trains each config with each seed, in FOLDER/CONFIG/seed_N. Finished runs are skipped, unfinished ones go on.

Options that are not listed here are those of fit (--trainer.max_epochs, ...), for all runs.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import Trial, TrialState

from lightning_danns.atomic import read_yaml
from lightning_danns.errors import UsageError
from lightning_danns.study import queue
from lightning_danns.study.settings import differences, finished, parse, result_of, settings_of, user_path


class Run(NamedTuple):
    """One fit: its folder, the arguments of ``fit`` and all settings that they amount to."""

    folder: Path
    args: list[str]
    settings: dict[str, Any]

    def finished(self) -> bool:
        return finished(result_of(self.folder), self.settings["trainer"]["max_epochs"])

    def refuse_changed(self) -> None:
        """An earlier part of this run must have been trained with the same settings, but for a lower max_epochs."""
        earlier = read_yaml(self.folder / "config.yaml") if (self.folder / "config.yaml").exists() else self.settings
        for name, was, now in differences(earlier, self.settings):
            if name != "trainer.max_epochs" or was in (None, -1) or 0 <= (-1 if now is None else now) < was:
                raise UsageError(f"{self.folder} was trained with {name}={was}, not {now}: give another --folder")


def plan(configs: Sequence[Path], seeds: Sequence[int], folder: Path, fit_args: Sequence[str]) -> dict[str, Run]:
    """The runs by name, seed by seed, so that an unfinished comparison has all arms."""
    arms: dict[str, list[str]] = {}
    for config in configs:
        if not config.is_file():
            raise UsageError(f"config {config} does not exist (configs come first, then the options)")
        if config.stem in arms:
            raise UsageError(f"{config}: another config would have the same folder, {folder / config.stem}")
        arms[config.stem] = [f"--config={config}", *fit_args]
    settings = {arm: settings_of(args) for arm, args in arms.items()}
    runs = {}
    for seed in seeds:
        for arm, args in arms.items():
            run_dir, given = folder / arm / f"seed_{seed}", {"seed_everything": seed}
            runs[f"{arm}/seed_{seed}"] = Run(run_dir, [*args, f"--seed_everything={seed}"], settings[arm] | given)
    return runs


def reached(result: dict[str, Any]) -> str:
    """What a fit came to, in a line: its best value or, of a fit without validation, its last test or loss."""
    if result.get("best") is not None:
        return f"best {result['monitor']} {result['best']:.4f}"
    last = {name: value for name, value in result.get("metrics", {}).items() if "/" not in name}
    told = [name for name in last if name.startswith("test_")] or list(last)
    return ", ".join(f"{name} {last[name]:.4f}" for name in told) or "finished"


def main(args: Sequence[str]) -> int:
    """Train what is left of the comparison; returns the exit status: 1 if a run failed."""
    parser = ArgumentParser("python -m lightning_danns.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("configs", nargs="+", type=user_path, help="config files; their names are those of the arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of all configs (default: 0)")
    parser.add_argument("--folder", type=user_path, required=True, help="of all runs, e.g. runs/mnist")
    options, rest = parse(parser, args, given=("--seed_everything", "--config"))
    runs = plan(options.configs, options.seeds, options.folder, rest)
    for run in runs.values():
        run.refuse_changed()
    left = {name: run.args for name, run in runs.items() if not run.finished()}
    print(f"{len(runs) - len(left)} of {len(runs)} runs are finished", flush=True)
    if not left:
        return 0
    storage = queue.open_storage(options.folder, options.storage)
    name = str(options.folder) if options.storage else "compare"
    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)

    def train(trial: Trial) -> float:
        name = trial.user_attrs["run"]  # which may be of another command on the same folder
        if name in runs and runs[name].finished():  # since it was queued, by another process
            raise optuna.TrialPruned
        queue.fit(left.get(name, trial.user_attrs["args"]), options.folder / name)
        result = result_of(options.folder / name)
        trial.set_user_attr("ended", reached(result))
        return float(result.get("epochs", 0))  # Optuna wants a number; what is done, the folder tells

    queue.fill(study, left, again=True)
    if options.jobs > 1:
        return queue.several("compare", args, options.jobs)
    queue.work(study, train)
    elsewhere = queue.names(study, TrialState.RUNNING)
    failed = [name for name, run in runs.items() if not run.finished() and name not in elsewhere]
    if failed:
        print(f"not finished, see log.txt of each: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
