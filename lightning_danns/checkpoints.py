"""Checkpoints that an interruption at any moment leaves whole, and from which training goes on exactly."""

import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO

from lightning_danns.atomic import replacing


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


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest state in ``last.ckpt``: after the metrics of each epoch and, if asked, within epochs.

    A fit that ends within an epoch (max_steps, max_time) is saved there, so that a later one finishes that epoch.
    Under SLURM, it also lets the signal that announces the end of a job (SIGUSR1) wait for the end of a step, in all
    processes of the same one. Lightning saves and requeues at once, in the middle of a step.

    Args:
        dirpath: folder; if not given, ``checkpoints`` in the folder of the run.
        every_n_train_steps: also save after every so many optimizer steps.
        train_time_interval: also save when so much time has passed.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
    ) -> None:
        super().__init__(
            dirpath, filename="last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False
        )
        # set here, because ModelCheckpoint saves either within epochs or after them
        self._every_n_train_steps, self._train_time_interval = every_n_train_steps or 0, train_time_interval
        self._requeue: Callable[..., Any] | None = None
        self._signalled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        handler = signal.getsignal(signal.SIGUSR1)
        if SLURMEnvironment.detect() and callable(handler):
            self._requeue, self._signalled = handler, False
            signal.signal(signal.SIGUSR1, self._note_signal)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        # not after an epoch's last batch: a fit resumed from there would skip the validation of that epoch
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        super().on_train_batch_end(trainer, *args, **kwargs)
        if trainer.fit_loop.epoch_loop.done and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if self._requeue and trainer.strategy.reduce_boolean_decision(self._signalled, all=False):
            requeue, self._requeue = self._requeue, None
            requeue(signal.SIGUSR1, None)

    def _note_signal(self, *call: Any) -> None:
        self._signalled = True
