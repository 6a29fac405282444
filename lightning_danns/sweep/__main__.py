"""Search of settings for those with the lowest validation loss: ``python -m lightning_danns.sweep --help``."""

import argparse
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danns import workers
from lightning_danns.errors import UsageError
from lightning_danns.sweep.search_space import KINDS, design
from lightning_danns.sweep.trials import (
    TRIES,
    Sweep,
    best_trial,
    described,
    ended,
    finished,
    rehearse,
    row_of,
    running,
    work,
    write_results,
)

if TYPE_CHECKING:
    import subprocess

    import optuna


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
        process = workers.start("lightning_danns.sweep", [*args, "--worker=rehearse"], log, jobs=1)
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
        self.printed = {trial.number for trial in ended(study)}
        self.succeeded = 0
        if self.printed:
            print(f"{len(self.printed)} of {sweep.trials} trials are done", flush=True)

    def update(self) -> None:
        trials = ended(self.study)
        for trial in trials:
            if trial.number not in self.printed:
                self.printed.add(trial.number)
                self.succeeded += trial.state.name != "FAIL"
                print(self._line(trial, trials), flush=True)

    def _line(self, trial: "optuna.trial.FrozenTrial", trials: "list[optuna.trial.FrozenTrial]") -> str:
        sweep = self.sweep
        row = row_of(sweep, trial)
        value = f"{sweep.monitor} {row['value']:.4f}" if row["value"] is not None else row["state"]
        pruned = f" (pruned after {row['epochs']} epochs)" if row["state"] == "pruned" else ""
        line = f"[{len(self.printed)}/{sweep.trials}] trial {trial.number}: {described(trial.params)}: {value}{pruned}"
        best = best_trial(sweep, self.study)
        if best is not None:
            line += f"; best {best.value:.4f} (trial {best.number})"
        seconds = [t.duration.total_seconds() for t in trials if t.duration]
        left = sweep.trials - len(self.printed)
        if left > 0 and seconds:
            at_once = max(1, len(running(self.study)))
            line += f"; {_duration(left * sum(seconds) / len(seconds) / at_once)} left"
        return line


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"


def run(sweep: Sweep, args: list[str]) -> int:
    """Keep ``--jobs`` workers at work until the sweep is finished."""
    study = prepare(sweep, args)
    progress = Progress(sweep, study)
    here = f"{socket.gethostname()}-{os.getpid()}"
    logs = [sweep.folder / "workers" / f"{here}-{index}.txt" for index in range(sweep.jobs)]

    def start(index: int) -> "subprocess.Popen[bytes]":
        return workers.start("lightning_danns.sweep", [*args, "--worker=work"], logs[index], sweep.jobs, index)

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
    print(f"best: trial {best.number}, {described(best.params)}: {sweep.monitor} {best.value:.4f}")
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
