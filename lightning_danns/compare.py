"""Several configs over several seeds, one folder for each run: ``python -m lightning_danns.compare --help``.

What is done is told by the run folders alone, so the same command goes on after whatever ended it, and two machines
that see the folder share the runs.
"""

import csv
import io
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lightning_danns import workers
from lightning_danns.errors import UsageError

NO_MATTER = {
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.default_root_dir"),
    *("data.init_args.data_dir", "data.init_args.num_workers"),
}
"""Settings that do not change what is trained."""


class Run(NamedTuple):
    """One fit: its folder, the arguments of ``train.py fit`` and all settings that they amount to."""

    name: str
    folder: Path
    args: list[str]
    settings: dict[str, Any]


def settings_of(args: Sequence[str]) -> dict[str, Any]:
    """All settings, defaults too, of ``train.py fit`` with these arguments.

    Raises:
        SystemExit: with status 2 and a line of text, for a mistake in them.
    """
    from lightning_danns.cli import main

    text = io.StringIO()
    try:
        with redirect_stdout(text):
            main(["fit", *args, "--print_config"])
    except SystemExit as exit:
        if exit.code:
            raise
    return yaml.safe_load(text.getvalue())


def queue(configs: Sequence[Path], seeds: Sequence[int], folder: Path, fit_args: Sequence[str]) -> list[Run]:
    """The runs, seed by seed, so that an unfinished comparison has all arms.

    Raises:
        UsageError: a config does not exist, two have one name, or a seed is given twice.
    """
    for config in configs:
        if not config.is_file():
            raise UsageError(f"config {config} does not exist (configs come first, then the options)")
    arms = {config.stem: config for config in configs}
    for config in configs:
        if arms[config.stem] != config or list(configs).count(config) > 1:
            raise UsageError(f"{config} and {arms[config.stem]} would have one folder, {folder / config.stem}")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: each must be there once")
    args = {arm: [*workers.QUIET, "--config", str(config), *fit_args] for arm, config in arms.items()}
    settings = {arm: settings_of(args[arm]) for arm in arms}
    return [_run(arm, seed, folder, args[arm], settings[arm]) for seed in seeds for arm in arms]


def _run(arm: str, seed: int, folder: Path, args: list[str], settings: dict[str, Any]) -> Run:
    run_dir = folder / arm / f"seed_{seed}"
    args = [*args, f"--seed_everything={seed}", f"--run_dir={run_dir}", "--ckpt_path=last"]
    return Run(f"{arm} seed {seed}", run_dir, args, settings | {"seed_everything": seed})


def refuse_changed(run: Run) -> None:
    """An earlier part of this run must have been trained with the same settings, but for a lower max_epochs.

    Raises:
        UsageError: it was trained with others.
    """
    path = run.folder / "config.yaml"
    if not path.exists():
        return
    earlier = yaml.safe_load(path.read_text())
    sections = ("seed_everything", "model", "data", "trainer")
    old, new = ({name: config.get(name) for name in sections} for config in (earlier, run.settings))
    for key, was, now in _differences(old, new):
        raised = key == "trainer.max_epochs" and was not in (None, -1) and (now in (None, -1) or now > was)
        if key not in NO_MATTER and not raised:
            raise UsageError(f"{run.folder} was trained with {key}={was}, not {now}: give another --folder")


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key, old, new


def finished(run: Run) -> bool:
    """Whether ``last.ckpt`` is from the end of the last epoch (or step), or from where EarlyStopping ended the fit.

    Its metrics were written before it.
    """
    from lightning_danns.run_folder import last_checkpoint, stopped_early

    state = last_checkpoint(run.folder)
    if state is None:
        return False
    epochs = state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    trainer = run.settings["trainer"]
    last_epoch, last_step = trainer["max_epochs"], trainer["max_steps"]
    all_epochs = 0 <= (-1 if last_epoch is None else last_epoch) <= epochs
    return all_epochs or 0 < last_step <= state["global_step"] or stopped_early(state)


def last_metrics(folder: Path) -> str:
    """The newest value of each metric of the run (not those of its layers)."""
    values: dict[str, str] = {}
    if (folder / "metrics.csv").exists():
        with open(folder / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                values |= {name: value for name, value in row.items() if value and "/" not in name}
    values.pop("step", None)
    epoch = values.pop("epoch", None)
    metrics = " ".join(f"{name} {float(value):.4f}" for name, value in sorted(values.items()))
    return f"{int(epoch) + 1} epochs, {metrics}" if epoch else "nothing logged"


class Crew:
    """At most ``jobs`` runs at a time, each in a process of its own, each folder locked while it trains."""

    def __init__(self, runs: Sequence[Run], jobs: int) -> None:
        self.pending, self.jobs, self.total = list(runs), jobs, len(runs)
        self.active: dict[int, tuple[Run, subprocess.Popen[bytes], float]] = {}
        self.failed: list[Run] = []
        self.locks = {run.name: self._lock(run) for run in runs}

    def _lock(self, run: Run) -> Any:
        return workers.lease(run.folder / "running.lock", lost=lambda: self._lost(run.name))

    def work(self) -> None:
        """Until all runs are finished or failed, here or on other machines."""
        waiting = False
        try:
            while self.pending or self.active:
                for slot in [slot for slot, (_, process, _) in self.active.items() if process.poll() is not None]:
                    self._end(slot)
                for run in list(self.pending):
                    if len(self.active) < self.jobs and workers.taken(self.locks[run.name]):
                        self._start(run)
                if self.pending and not self.active and not waiting:
                    print(f"{len(self.pending)} runs are under way elsewhere: waiting for them", flush=True)
                    waiting = True
                if self.pending or self.active:
                    time.sleep(0.5)
        finally:
            workers.stop([process for _, process, _ in self.active.values()])
            for lock in self.locks.values():
                lock.release()

    def _start(self, run: Run) -> None:
        self.pending.remove(run)
        if finished(run):  # by another machine, or before
            self.locks[run.name].release()
            print(f"{run.name}: finished already, {last_metrics(run.folder)}; {self._left()}", flush=True)
            return
        refuse_changed(run)
        slot = next(slot for slot in range(self.jobs) if slot not in self.active)
        goes_on = "goes on" if (run.folder / "checkpoints" / "last.ckpt").exists() else "starts"
        print(f"{run.name}: {goes_on}", flush=True)
        process = workers.start("lightning_danns.compare", ["fit", *run.args], run.folder / "log.txt", self.jobs, slot)
        self.active[slot] = run, process, time.monotonic()

    def _end(self, slot: int) -> None:
        run, process, begin = self.active.pop(slot)
        self.locks[run.name].release()
        if process.returncode != 0:
            self.failed.append(run)
        how = last_metrics(run.folder) if process.returncode == 0 else f"failed (status {process.returncode})"
        print(f"{run.name}: {how} ({(time.monotonic() - begin) / 60:.1f} min); {self._left()}", flush=True)

    def _left(self) -> str:
        return f"{len(self.pending) + len(self.active)} of {self.total} left"

    def _lost(self, name: str) -> None:
        """Another machine took the run over, because this one was stopped for a while."""
        for run, process, _ in self.active.values():
            if run.name == name:
                process.kill()


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line on ``args`` (default: ``sys.argv``); returns the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    parser = workers.ArgumentParser(
        "python -m lightning_danns.compare",
        "Trains each config with each seed, in FOLDER/CONFIG/seed_N. Finished runs are skipped, unfinished ones go on. "
        "Options that are not listed here are those of train.py fit (--trainer.max_epochs, ...), for all runs.",
    )
    parser.add_argument("configs", nargs="+", type=Path, help="config files; their names are those of the arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of all configs (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes on this machine (default: 1)")
    parser.add_argument("--folder", type=Path, required=True, help="of all runs, e.g. runs/mnist")

    def work() -> int:
        options, rest = parser.parse_with_rest(args, given=("--seed_everything", "--config"))
        runs = queue(options.configs, options.seeds, options.folder, rest)
        for run in runs:
            refuse_changed(run)
        crew = Crew(runs, options.jobs)
        crew.work()
        for run in crew.failed:
            log = run.folder / "log.txt"
            print(f"failed: {run.name} ({log}): {workers.last_lines(log)}", file=sys.stderr)
        return 1 if crew.failed else 0

    return workers.exit_on_mistake(work)


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["fit"]:  # one run, in a process that `Crew` started; with DDP, Lightning starts more like it
        from lightning_danns.cli import main as fit

        workers.end_with_parent()
        sys.argv[0] = "train.py"  # which mistakes refer to
        fit()
    else:
        sys.argv = ["train.py"]
        sys.exit(main(given))
