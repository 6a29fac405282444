"""Search of settings for those with the lowest validation loss: ``python -m lightning_danns.sweep --help``.

All that is known of a sweep is in its folder: Optuna's journal (``journal.log``), and a run folder for each trial.
Workers take trials from there one after the other, so those of a second machine join in, and a new start goes on.
"""

import argparse
import csv
import io
import logging
import math
import os
import random
import socket
import sys
import tempfile
import time
import uuid
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lightning_danns import workers
from lightning_danns.atomic import replacing
from lightning_danns.errors import DivergedError, UsageError

if TYPE_CHECKING:
    import subprocess

    import optuna

KINDS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A,B,..."
TRIES = 3
"""How often a trial is tried whose process dies."""


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UsageError('the search is Optuna\'s: pip install -e ".[study]"') from error
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


class Axis(NamedTuple):
    """One searched key: the values of ``kind`` from ``low`` to ``high``, or one of ``choices``."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def at(self, u: float) -> Any:
        """The value at ``u`` in [0, 1] of the axis."""
        if self.kind == "choice":
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "log":
            value = float(f"{self.low * (self.high / self.low) ** u:.6g}")
            return min(max(value, self.low), self.high)
        value = self.low + u * (self.high - self.low)
        return round(value) if self.kind == "int" else value

    def __str__(self) -> str:
        return (
            f"{self.key} ({', '.join(self.choices) if self.choices else f'{self.kind} {self.low:g} to {self.high:g}'})"
        )

    def suggest(self, trial: "optuna.Trial") -> Any:
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.choices)
        if self.kind == "int":
            return trial.suggest_int(self.key, int(self.low), int(self.high))
        return trial.suggest_float(self.key, self.low, self.high, log=self.kind == "log")


def parse_axis(text: str) -> Axis:
    """``KEY=KIND:...`` as an axis.

    Raises:
        UsageError: it is not of that form, or holds no range.
    """
    key, _, space = text.partition("=")
    kind, _, rest = space.partition(":")
    key = key.removeprefix("--")
    if not key or kind not in ("log", "uniform", "int", "choice") or not rest:
        raise UsageError(f"--search {text}: it must be KEY= and one of {KINDS}")
    if kind == "choice":
        choices = tuple(rest.split(","))
        if len(set(choices)) < 2 or len(set(choices)) < len(choices):
            raise UsageError(f"--search {text}: there must be two choices or more, all different")
        return Axis(key, kind, choices=choices)
    try:
        low, high = (int(end) if kind == "int" else float(end) for end in rest.split(":"))
    except ValueError:
        raise UsageError(f"--search {text}: after {kind}: there must be two numbers, LOW:HIGH") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--search {text}: {rest} is no range, its low end must be below its high end")
    if kind == "log" and low <= 0:
        raise UsageError(f"--search {text}: a logarithmic range must begin above 0")
    return Axis(key, kind, low, high)


def design(axes: Sequence[Axis], number: int) -> list[dict[str, Any]]:
    """``number`` points that cover each axis evenly, its ends included; for several axes, a Latin hypercube."""
    generator = random.Random(0)
    columns = []
    for _ in axes:
        column = [k / (number - 1) if number > 1 else 0.5 for k in range(number)]
        generator.shuffle(column)  # so that the first trials, which the pruner compares with, are from everywhere
        columns.append(column)
    return [{axis.key: axis.at(u) for axis, u in zip(axes, point, strict=True)} for point in zip(*columns, strict=True)]


class Sweep:
    """A folder, what is searched there, and the arguments of ``train.py fit`` that all trials share."""

    def __init__(self, options: Namespace, fit_args: list[str]) -> None:
        self.axes = [parse_axis(text) for text in options.search]
        self.fit_args, self.trials, self.jobs = fit_args, options.trials, options.jobs
        self.monitor, self.mode, self.startup, self.prune = (
            options.monitor,
            options.mode,
            options.startup,
            not options.no_pruning,
        )
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
        self.worst = math.inf if self.mode == "min" else -math.inf

    def settings(self) -> dict[str, Any]:
        """What must not change while a sweep goes on; configs by their content."""
        return {
            "search": [list(axis) for axis in map(_plain, self.axes)],
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

        path = str((self.folder / "journal.log").resolve())
        # not the default, whose symbolic link is never given up if it does not lead to the journal on this machine
        storage = JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
        return optuna.create_study(
            study_name="sweep",
            storage=storage,
            load_if_exists=True,
            direction="minimize" if self.mode == "min" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=uuid.uuid4().int % 2**32, n_startup_trials=self.startup),
            pruner=optuna.pruners.MedianPruner() if self.prune else optuna.pruners.NopPruner(),
        )

    def arguments(self, params: dict[str, Any], run_dir: Path) -> list[str]:
        searched = [f"--{key}={value}" for key, value in params.items()]
        options = [*workers.QUIET, "--trainer.enable_checkpointing=false", f"--run_dir={run_dir}"]
        return ["fit", *self.fit_args, *searched, *options]


def _plain(axis: Axis) -> tuple[Any, ...]:
    return (*axis[:-1], list(axis.choices))


# ---------------------------------------------------------------------------------------------------- in a worker


def rehearse(sweep: Sweep) -> None:
    """One batch of training and validation, so that mistakes are found before anything is written."""
    with tempfile.TemporaryDirectory() as folder:
        _fit(sweep, [*sweep.arguments(design(sweep.axes, 1)[0], Path(folder)), "--trainer.fast_dev_run=true"], None)


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
    return len(_ended(study)) >= sweep.trials


def _ended(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Those that count: not the tries that were given back."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.is_finished() and "given_back" not in trial.user_attrs]


def _running(study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    return study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.RUNNING,))


def ask(sweep: Sweep, study: "optuna.Study", locks: dict[int, Any]) -> "optuna.Trial | None":
    """The next trial, if there are not enough already. Its lock says that somebody is at it."""
    if len(_ended(study)) + len(_running(study)) >= sweep.trials:
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
    for trial in _running(study):
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
        study.tell(trial, (min if sweep.mode == "min" else max)(values.values()))


def _fit(sweep: Sweep, args: list[str], trial: "optuna.Trial | None", study: Any = None) -> str:
    """How it ended: finished, pruned or diverged."""
    from lightning_danns.callbacks import ReportToTrial
    from lightning_danns.cli import main

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


# ---------------------------------------------------------------------------------------------------- in the parent


def prepare(sweep: Sweep, args: list[str]) -> "optuna.Study":
    """The study of the folder, made if there is none.

    Raises:
        UsageError: the folder holds another sweep, or the rehearsal ends in a mistake.
    """
    settings = sweep.settings()
    with _removed_if_empty(sweep.folder), sweep.lock():
        if not (sweep.folder / "journal.log").exists():
            _rehearse_in_a_process(args)
        study = sweep.load()
        if "settings" not in study.user_attrs:
            for point in design(sweep.axes, min(sweep.startup, sweep.trials)):
                study.enqueue_trial(point, skip_if_exists=True)
            study.set_user_attr("settings", settings)
    for name, value in study.user_attrs["settings"].items():
        if settings[name] != value:
            raise UsageError(
                f"{sweep.folder} holds a sweep with other {name}, {value} and not {settings[name]}: "
                "give another --folder"
            )
    return study


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _rehearse_in_a_process(args: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = workers.start(__spec__.name, [*args, "--worker=rehearse"], log, jobs=1)
        try:
            status = process.wait()
        finally:
            workers.stop([process])
        if status != 0:
            raise UsageError(workers.last_lines(log).removeprefix("error: "))


class Progress:
    """Prints a line for each trial that has ended, whoever trained it."""

    def __init__(self, sweep: Sweep, study: "optuna.Study") -> None:
        self.sweep, self.study = sweep, study
        self.printed = {trial.number for trial in _ended(study)}
        self.succeeded = 0
        if self.printed:
            print(f"{len(self.printed)} of {sweep.trials} trials are done", flush=True)

    def update(self) -> None:
        ended = _ended(self.study)
        for trial in ended:
            if trial.number not in self.printed:
                self.printed.add(trial.number)
                self.succeeded += trial.state.name != "FAIL"
                print(self._line(trial, ended), flush=True)

    def _line(self, trial: "optuna.trial.FrozenTrial", ended: "list[optuna.trial.FrozenTrial]") -> str:
        sweep = self.sweep
        row = _row(sweep, trial)
        value = f"{sweep.monitor} {row['value']:.4f}" if row["value"] is not None else row["state"]
        pruned = f" (pruned after {row['epochs']} epochs)" if row["state"] == "pruned" else ""
        line = f"[{len(self.printed)}/{sweep.trials}] trial {trial.number}: {_settings(trial.params)}: {value}{pruned}"
        best = best_trial(sweep, self.study)
        if best is not None:
            line += f"; best {best.value:.4f} (trial {best.number})"
        seconds = [t.duration.total_seconds() for t in ended if t.duration]
        left = sweep.trials - len(self.printed)
        if left > 0 and seconds:
            at_once = max(1, len(_running(self.study)))
            line += f"; {_duration(left * sum(seconds) / len(seconds) / at_once)} left"
        return line


def _settings(params: dict[str, Any]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _row(sweep: Sweep, trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """What is known of a trial: its value is the best of its epochs, also if it was pruned."""
    values = trial.intermediate_values.values()
    diverged = "diverged" in trial.user_attrs
    return {
        "number": trial.number,
        "state": "diverged" if diverged else "failed" if trial.state.name == "FAIL" else trial.state.name.lower(),
        "value": (min if sweep.mode == "min" else max)(values) if values and not diverged else None,
        **{axis.key: trial.params.get(axis.key) for axis in sweep.axes},
        "epochs": len(values),
        "seconds": trial.user_attrs.get("seconds"),
    }


def best_trial(sweep: Sweep, study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """The best of those that were trained to their end."""
    trained = [
        t for t in _ended(study) if t.state.name == "COMPLETE" and t.value is not None and math.isfinite(t.value)
    ]
    return min(trained, key=lambda trial: (trial.value or 0.0) * (1 if sweep.mode == "min" else -1), default=None)


def write_results(sweep: Sweep, study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """``trials.csv`` and ``best.yaml``; the best trial."""
    rows = [_row(sweep, trial) for trial in _ended(study)]
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
        f"{', '.join(map(str, sweep.axes))}: trial {best.number}, {_settings(best.params)}.\n"
        f"#   python train.py fit --config {sweep.folder / 'best.yaml'}\n"
        f"# Expect: {sweep.monitor} {best.value:.4f} in the best of {len(best.intermediate_values)} epochs "
        f"(seed {config['seed_everything']}).\n"
    )
    _write(sweep.folder / "best.yaml", head + yaml.safe_dump(config, sort_keys=False))
    return best


def _write(path: Path, text: str) -> None:
    with replacing(path, partial=f".{path.name}.{uuid.uuid4().hex}") as file:
        file.write(text.encode())


def run(sweep: Sweep, args: list[str]) -> int:
    """Keep ``--jobs`` workers at work until the sweep is finished."""
    study = prepare(sweep, args)
    progress = Progress(sweep, study)
    logs = [
        sweep.folder / "workers" / f"{socket.gethostname()}-{os.getpid()}-{index}.txt" for index in range(sweep.jobs)
    ]

    def start(index: int) -> "subprocess.Popen[bytes]":
        return workers.start(__spec__.name, [*args, "--worker=work"], logs[index], sweep.jobs, index)

    crew = [] if finished(sweep, study) else [start(index) for index in range(sweep.jobs)]
    deaths, succeeded = 0, 0
    try:
        while not finished(sweep, study) or any(process.poll() is None for process in crew):
            for index, process in enumerate(crew):
                status = process.poll()
                if status in (None, 0):
                    continue
                last = workers.last_lines(logs[index])
                if status == 2:
                    raise UsageError(last.removeprefix("error: "))
                deaths, succeeded = (1 if progress.succeeded > succeeded else deaths + 1), progress.succeeded
                print(f"worker {index} died (status {status}): {last}", file=sys.stderr, flush=True)
                if deaths > TRIES * sweep.jobs:
                    print(f"error: the workers die one after the other: {logs[index]}", file=sys.stderr)
                    return 1
                crew[index] = start(index)
            progress.update()
            time.sleep(0.5)
        progress.update()
    finally:
        workers.stop(crew)
    best = write_results(sweep, study)
    print(f"\nall trials: {sweep.folder / 'trials.csv'}")
    if best is None:
        print("error: no trial was trained to its end: search another range", file=sys.stderr)
        return 1
    print(f"best: trial {best.number}, {_settings(best.params)}: {sweep.monitor} {best.value:.4f}")
    print(f"train it:  python train.py fit --config {sweep.folder / 'best.yaml'}")
    return 0


def options_parser() -> workers.ArgumentParser:
    """What the command line takes."""
    parser = workers.ArgumentParser(
        "python -m lightning_danns.sweep",
        "Searches config keys for the lowest validation loss. Options that are not listed here are those "
        "of train.py fit (--config, --trainer.max_epochs, ...) and are the same for all trials. The same command goes "
        "on with an interrupted sweep; on another machine that sees the folder, it helps.",
    )
    add = parser.add_argument
    add("--search", action="append", required=True, metavar="KEY=SPACE", help=f"{KINDS}; repeat for several keys")
    add("--folder", type=Path, required=True, help="of the sweep, e.g. sweeps/layernorm")
    add("--trials", type=int, default=20, help="how many, on all machines together (default: 20)")
    add("--jobs", type=int, default=1, help="processes on this machine (default: 1)")
    add("--startup", type=int, default=10, help="so many of the first trials are spread evenly over the ranges, and "
        "the others follow from those before (TPE); as many as --trials: a grid (default: 10)")  # fmt: skip
    add("--monitor", default="val_loss", help="metric of the held-out images (default: val_loss)")
    add("--mode", choices=("min", "max"), default="min", help="which end of it is best (default: min)")
    add("--no_pruning", action="store_true", help="train hopeless trials to their end, too")
    add("--worker", choices=("work", "rehearse"), help=argparse.SUPPRESS)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on ``args`` (default: ``sys.argv``); returns the exit status."""
    args = list(sys.argv[1:] if args is None else args)

    def work_or_run() -> int:
        options, fit_args = options_parser().parse_with_rest(args)
        sweep = Sweep(options, fit_args)
        if options.worker is None:
            return run(sweep, args)
        workers.end_with_parent()
        sys.argv = ["train.py"]  # which mistakes refer to
        (work if options.worker == "work" else rehearse)(sweep)
        return 0

    return workers.exit_on_mistake(work_or_run)


if __name__ == "__main__":
    sys.exit(main())
