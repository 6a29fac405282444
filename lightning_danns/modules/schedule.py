"""The scheduler of a module: its length, how often it steps, and what a plateau is measured by."""

import inspect
import math
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_danns.errors import UsageError
from lightning_danns.optim import rehearse


def scheduled(module: pl.LightningModule, factory: Any, optimizer: Optimizer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for an optimizer and the function that makes its scheduler.

    An argument ``total`` of the function that is None becomes the length of the fit, in steps or epochs.
    """
    parameters, length = inspect.signature(factory).parameters, {}
    if "total" in parameters and parameters["total"].default is None:
        interval = parameters["interval"].default if "interval" in parameters else "epoch"
        trainer = module.trainer
        total = trainer.estimated_stepping_batches
        if interval == "epoch":
            total /= math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if total == float("inf"):
            raise UsageError("the schedule spans the whole fit, which has no end: give max_epochs or max_steps")
        length = {"total": math.ceil(total)}
    rehearse(lambda stand_in: factory(stand_in, **length), optimizer)
    scheduler = factory(optimizer, **length)
    config = {"scheduler": scheduler, "interval": getattr(scheduler, "interval", "epoch")}
    # not as Lightning's plateau: it steps after the epoch's checkpoint, so that a resumed fit would lack a step
    return {"optimizer": optimizer, "lr_scheduler": {**config, "reduce_on_plateau": False}}


def step_plateaus(module: pl.LightningModule) -> None:
    """Step each ReduceLROnPlateau by its ``monitor`` (``val_loss`` if it has none) at the end of a whole epoch."""
    trainer = module.trainer
    if not trainer.is_last_batch:  # max_steps or max_time ended the fit within the epoch
        return
    for scheduler in [config.scheduler for config in trainer.lr_scheduler_configs]:
        if not isinstance(scheduler, ReduceLROnPlateau):
            continue
        monitor, logged = getattr(scheduler, "monitor", "val_loss"), trainer.callback_metrics
        if monitor.startswith("val_") and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1):
            continue  # nothing new
        if monitor not in logged:
            raise UsageError(
                f"ReduceLROnPlateau follows {monitor!r}, which was not logged: {', '.join(sorted(logged))}"
            )
        scheduler.step(logged[monitor])
