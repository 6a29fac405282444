"""How a fit that is a trial of a sweep tells its validation, and ends early where it is hopeless."""

import math
from typing import Any

import pytorch_lightning as pl

from lightning_danns.errors import UsageError


class ReportToTrial(pl.Callback):
    """Reports each epoch's validation to an Optuna trial, and ends the fit where the trial should be pruned.

    Not in the first third of the epochs, in which small learning rates are behind without being worse.

    Args:
        monitor: the metric to report.
        trial: the trial; None only checks.

    Attributes:
        outcome: ``finished``, ``pruned``, or ``diverged``: the metric is NaN or infinite.

    Raises:
        UsageError: test images are evaluated, none are held out, several processes train, or there is no such metric.
    """

    def __init__(self, monitor: str, trial: Any = None) -> None:
        self.monitor, self.trial, self.outcome = monitor, trial, "finished"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "val_size", None) == 0:
            raise UsageError("val_size=0: a search selects by held-out images, and none are held out")
        if getattr(data, "test_each_epoch", False):
            raise UsageError("test_each_epoch=True: a search must not see the test images")
        if trainer.world_size > 1:
            raise UsageError(f"{trainer.world_size} processes for one trial: give --trainer.devices=1")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(name for name in trainer.callback_metrics if name.startswith("val"))
            raise UsageError(f"--monitor {self.monitor}: the model logs no such metric, but {known or 'none'}")
        value, epoch = float(trainer.callback_metrics[self.monitor]), trainer.current_epoch
        if not math.isfinite(value):
            self.outcome, trainer.should_stop = "diverged", True
        elif self.trial is not None:
            self.trial.report(value, epoch)
            if 3 * (epoch + 1) >= (trainer.max_epochs or 0) and self.trial.should_prune():
                self.outcome, trainer.should_stop = "pruned", True
