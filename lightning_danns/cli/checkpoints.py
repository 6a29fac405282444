"""Checkpoints of a run: the best epoch, and the newest state, from which training goes on exactly.

An interruption at any moment leaves them whole; a run folder may be moved.
"""

import math
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO

from lightning_danns.atomic import replacing
from lightning_danns.errors import UsageError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the checkpoint, and replaces it only when the new one is complete and on the disk.

    Lightning writes into the system's temporary folder; moving from there to another file system is a copy, which
    destroys the earlier checkpoint before the new one is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # no local file
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without underscores, because Lightning takes every name with hpc_ckpt_ in it for a checkpoint. What a killed
        # process left there is overwritten.
        try:
            with replacing(path, partial=f".{path.stem.replace('_', '')}.partial") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch's writer stumbles over later
                raise error.__context__ from None
            raise


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best epoch as ``best.ckpt``, by the metric that the module's task calls best.

    Without validation there is nothing to choose by, and nothing is kept.

    Args:
        monitor: metric to choose by; the task's if not given.
        mode: ``"max"`` or ``"min"``; the task's for its metric, ``"min"`` for a loss, otherwise it must be given.
        save_top_k: how many epochs to keep; more than one are named ``best-epoch=E``.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        save_top_k: int = 1,
    ) -> None:
        super().__init__(
            filename="best" if save_top_k in (0, 1) else "best-{epoch}",
            monitor=monitor,
            mode=mode or "min",
            save_top_k=save_top_k,
            save_on_train_epoch_end=True,  # with the metrics of the whole epoch
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        monitor, logged = str(self.monitor), trainer.callback_metrics
        stage = monitor.partition("_")[0]
        if stage == "val" and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1):
            return  # the metric is of an earlier epoch
        if monitor in logged:
            super().on_train_epoch_end(trainer, pl_module)
        elif any(name.startswith(f"{stage}_") for name in logged):  # else there was no such stage
            known = ", ".join(sorted(logged))
            raise UsageError(f"best_checkpoint.monitor={monitor!r} was not logged; these were: {known}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Paths of the state are those of this folder: the run may have been moved."""

        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {name: here(state_dict[name]) for name in paths}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": scores, "dirpath": self.dirpath})


def monitored(best: tuple[str, str], monitor: str | None, mode: str | None) -> tuple[str, str]:
    """Metric and direction of the best epoch, of what is given and what the task says.

    Raises:
        UsageError: nothing says whether the metric should be high or low.
    """
    metric = monitor or best[0]
    if mode is not None:
        return metric, mode
    if metric == best[0]:
        return best
    if metric.endswith("loss"):
        return metric, "min"
    if metric.rpartition("_")[2] in ("accuracy", "r2"):
        return metric, "max"
    raise UsageError(f"is {metric} better when it is high or low? Give --best_checkpoint.mode max or min")


class LastCheckpoint(Checkpoint):
    """Keeps the newest state as ``last.ckpt``: after each epoch and, if asked, within epochs.

    A fit that ends within an epoch (max_steps, max_time) is saved there, so that a later one finishes that epoch.
    Under SLURM, it also lets the signal that announces the end of a job (SIGUSR1) wait for the end of a step, in all
    processes of the same one. Lightning saves and requeues at once, in the middle of a step.

    Args:
        every_n_train_steps: also save after every so many optimizer steps.
        train_time_interval: also save when so much time has passed.
    """

    def __init__(self, every_n_train_steps: int | None = None, train_time_interval: timedelta | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UsageError(f"every_n_train_steps={every_n_train_steps}: it must be at least 1")
        self.every_n_train_steps = every_n_train_steps or 0
        self.interval = math.inf if train_time_interval is None else train_time_interval.total_seconds()
        self.dirpath: str | None = None
        self._requeue: Callable[..., Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._signalled = self._ended_within_epoch = False
        self._saved_step, self._saved_time = 0, time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget()
        self._saved_step = trainer.global_step
        handler = signal.getsignal(signal.SIGUSR1)
        if SLURMEnvironment.detect() and callable(handler):
            self._requeue = handler
            signal.signal(signal.SIGUSR1, self._note_signal)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.is_last_batch:  # a fit resumed from there would skip the validation of that epoch
            self._ended_within_epoch = False
            return
        epochs, steps = trainer.min_epochs or 0, trainer.min_steps or 0
        stops = trainer.should_stop and trainer.current_epoch >= epochs and trainer.global_step >= steps
        self._ended_within_epoch = stops or 0 < trainer.max_steps <= trainer.global_step
        since = trainer.global_step - self._saved_step  # none within accumulation, where gradients would be lost
        due = 0 < self.every_n_train_steps <= since or self._overdue(trainer)
        if self._ended_within_epoch or (since > 0 and due):
            self._save(trainer)
        if self._requeue and trainer.strategy.reduce_boolean_decision(self._signalled, all=False):
            requeue, self._requeue = self._requeue, None
            requeue(signal.SIGUSR1, None)

    def _overdue(self, trainer: pl.Trainer) -> bool:
        if self.interval == math.inf:
            return False
        overdue = time.monotonic() - self._saved_time >= self.interval
        return trainer.strategy.reduce_boolean_decision(overdue, all=False)  # processes must save together

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._ended_within_epoch:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        if self.dirpath is None or trainer.fast_dev_run or trainer.sanity_checking:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(os.path.join(self.dirpath, "last.ckpt"))
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def _note_signal(self, *call: Any) -> None:
        self._signalled = True
