"""The folder of a run: its name, what it was made with, and how it ended."""

import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from lightning_danns import __version__
from lightning_danns.errors import UsageError

RUN_NAME = "LIGHTNING_DANNS_RUN_NAME"


def folder_of(run_dir: str, command: str) -> Path:
    """Where a command writes: a fit into the folder of the run, the others below it; absolute."""
    path = Path(os.path.abspath(os.path.expanduser(run_dir)))
    return path if command == "fit" else path / command


def run_name() -> str:
    """A name for a run, the same in all its processes, although they start at different times.

    Raises:
        UsageError: there are several processes, and nothing names what they share.
    """
    environment = os.environ
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_NTASKS", "1") != "1":
        return f"{environment['SLURM_JOB_ID']}_{environment['SLURM_STEP_ID']}"
    if environment.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return environment["TORCHELASTIC_RUN_ID"]
    if is_rank_zero() and "TORCHELASTIC_RUN_ID" not in environment:
        environment[RUN_NAME] = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"  # Lightning starts the other processes with it
    if RUN_NAME not in environment:
        raise UsageError("several processes need a common folder: give --run_dir (or torchrun --standalone)")
    return environment[RUN_NAME]


def refuse_used_folder(folder: Path) -> None:
    """A fresh fit must not overwrite the checkpoints of an earlier one. (SLURM requeues find theirs by themselves.)"""
    # in every process, so that none waits for one that has left
    if (folder / "checkpoints").exists() and not any(folder.glob("hpc_ckpt_*")):
        raise UsageError(
            f"run folder {folder} holds the checkpoints of an earlier fit: continue that one with --ckpt_path last, "
            "or choose another --run_dir"
        )


def keep_earlier(path: Path) -> None:
    """Give a log of an earlier start in the same folder another name, because the logger would wipe it."""
    if not path.exists() or not is_rank_zero():
        return
    number = 1
    while (earlier := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(earlier)


class _Late:
    """A logger whose files are made when training (or testing, ...) starts; Lightning asks for them before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun, self._waiting = False, []  # type: tuple[bool, list[Any]]

    def begin(self) -> None:
        """Make the files."""
        self.begun = True
        while self._waiting:
            self.log_hyperparams(*self._waiting.pop(0))

    @property
    def experiment(self) -> Any:
        return super().experiment if self.begun else None  # type: ignore[misc]

    def log_hyperparams(self, *args: Any) -> None:
        if self.begun:
            super().log_hyperparams(*args)  # type: ignore[misc]
        else:
            self._waiting.append(args)

    def save(self) -> None:
        if self.begun:
            super().save()  # type: ignore[misc]


class LateCSVLogger(_Late, CSVLogger):
    def begin(self) -> None:
        if not self.begun:
            keep_earlier(Path(self.log_dir) / "metrics.csv")
        super().begin()


class LateTensorBoardLogger(_Late, TensorBoardLogger): ...


class RunRecord(pl.Callback):
    """Writes into the folder of a run, in the process that trains:

        config.yaml         all settings, when training (or testing, ...) starts
        environment.yaml    versions, commit of this package's repository, device and threads
        result.yaml         when a fit has ended: why, after how many epochs, the best value and the last metrics

    A mistake that ends a command before it starts therefore leaves no folder.
    """

    def __init__(self, folder: Path, config: str, best: tuple[str, str]) -> None:
        self.folder, self.config, self.best = folder, config, best
        self.best_value: float | None = None
        self._started_at: int | None = None  # none in a fit that had nothing left to train

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_value = state_dict["best_value"]

    def _start(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, _Late):
                logger.begin()
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(self.config)
        device = str(trainer.strategy.root_device)
        (self.folder / "environment.yaml").write_text(yaml.safe_dump(environment(device)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer)
        self._started_at = trainer.global_step
        if trainer.is_global_zero:
            (self.folder / "result.yaml").unlink(missing_ok=True)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to wait for what no validation logs; if there is a sanity check, before training starts."""
        logged = trainer.callback_metrics
        if trainer.state.fn != "fit" or not any(name.startswith("val") for name in logged):
            return
        self._note(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = str(getattr(callback, "monitor", ""))
            if monitor.startswith("val") and monitor not in logged:
                known = ", ".join(sorted(logged))
                raise UsageError(f"{type(callback).__name__}: monitor={monitor!r} was not logged; these were: {known}")

    def _note(self, trainer: pl.Trainer) -> None:
        """Keep the best value of the task's metric, whatever the checkpoints follow."""
        monitor, mode = self.best
        if monitor in trainer.callback_metrics and not trainer.sanity_checking:
            value = float(trainer.callback_metrics[monitor])
            values = [value] if self.best_value is None else [value, self.best_value]
            self.best_value = max(values) if mode == "max" else min(values)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._started_at is None or trainer.global_step == self._started_at:
            return  # a run that was at its end already keeps its result
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        monitor, mode = self.best
        if not monitor.startswith("val_"):
            self._note(trainer)
        best = self.best_value
        result = {
            "ended_by": _ended_by(trainer),
            "epochs": trainer.current_epoch,
            "monitor": monitor,
            "mode": mode,
            "best": best,
            "metrics": metrics,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "result.yaml").write_text(yaml.safe_dump(result, sort_keys=False))


def _ended_by(trainer: pl.Trainer) -> str:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if 0 < trainer.max_steps <= trainer.global_step:
        return "max_steps"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return "max_epochs"
    timers = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    if any(left is not None and left <= 0 for left in timers):
        return "max_time"
    return "early_stopping" if any(isinstance(callback, EarlyStopping) for callback in callbacks) else "other"


def environment(device: str) -> dict[str, Any]:
    """What a run depends on beside its config: versions, commit of this package's repository, device and threads."""
    packages = ("torchvision", "pytorch-lightning", "torchmetrics", "numpy")
    return {
        "python": platform.python_version(),
        "lightning-danns": __version__,
        **{package: version(package) for package in packages},
        "torch": str(torch.__version__),  # with its build
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{device} ({_processor()})",
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit that this package's files are from, marked if they have been changed since; None without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # it may lie installed in somebody else's repository
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    with suppress(OSError):  # Linux, where platform.processor() is empty
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def is_rank_zero() -> bool:
    """Whether this process is the first of its run, as far as its environment tells."""
    return getattr(rank_zero_only, "rank", 0) == 0
