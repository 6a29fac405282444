"""Callbacks of Lightning that would undo learning-rate factors or signs, and what does the same without."""

from collections.abc import Iterable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch.optim import Optimizer

from lightning_danns.errors import UsageError
from lightning_danns.layers import dale_layers

UNFREEZE = "lightning_danns.Unfreeze(names, epoch), which keeps the parts in their groups"
CONFLICTS: tuple[tuple[type[pl.Callback], str, str], ...] = (
    (LearningRateFinder, "sets one rate for all groups, and other callbacks aside", "python -m lightning_danns.sweep"),
    (StochasticWeightAveraging, "sets one rate for all groups", "EMAWeightAveraging of pytorch_lightning.callbacks"),
    (ModelPruning, "computes weights anew from others, which nothing projects", "torch.nn.utils.prune after the fit"),
)


def refuse_conflicts(module: pl.LightningModule, callbacks: Iterable[pl.Callback]) -> None:
    """Refuse, before anything is set up, callbacks under which signed layers would train to wrong numbers."""
    signed = any(dale_layers(module))
    for callback in callbacks:
        if isinstance(callback, BackboneFinetuning) and not hasattr(module, "backbone"):
            raise UsageError(f"BackboneFinetuning: {type(module).__name__} has no attribute backbone: use {UNFREEZE}")
        for kind, reason, instead in CONFLICTS:
            if isinstance(callback, kind) and (signed or kind is LearningRateFinder):
                raise UsageError(f"{type(callback).__name__} {reason}: use {instead}")


def refuse_frozen_by_finetuning(module: pl.LightningModule, callbacks: Iterable[pl.Callback]) -> None:
    """Refuse finetuning that would add signed layers to the optimizer later, without their factors."""
    finetuning = next((callback for callback in callbacks if isinstance(callback, BaseFinetuning)), None)
    for layer_name, layer in dale_layers(module) if finetuning else ():
        for name, parameter in layer.named_parameters(recurse=False):
            if not parameter.requires_grad:
                raise UsageError(
                    f"{type(finetuning).__name__} has frozen {layer_name}.{name}, and would train it later without its "
                    f"learning-rate factor: use {UNFREEZE}"
                )


def refuse_groups_without_factors(optimizer: Optimizer, module: pl.LightningModule) -> None:
    """Refuse signed layers in groups without a factor, beside groups that have one."""
    without = [group for group in optimizer.param_groups if "lr_scale" not in group]
    if not without or len(without) == len(optimizer.param_groups):
        return  # all with factors, or all of somebody's own
    added = {parameter for group in without for parameter in group["params"]}
    for layer_name, layer in dale_layers(module):
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter in added:
                raise UsageError(
                    f"{layer_name}.{name} was added to the optimizer in a group without learning-rate factor: use "
                    f"{UNFREEZE}"
                )


def refuse_twice(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Refuse a callback of a kind that the Trainer has already: both would act."""
    if sum(type(other) is type(callback) for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise UsageError(f"the Trainer has two callbacks {type(callback).__name__}, and both would act: leave one out")


def refuse_unlogged(trainer: pl.Trainer) -> None:
    """Refuse to stop early by a metric that a whole epoch of training and validation has not logged."""
    if trainer.check_val_every_n_epoch != 1 or trainer.val_check_interval != 1.0 or not trainer.is_last_batch:
        return  # it may come in a later epoch
    logged = trainer.callback_metrics
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.strict and callback.monitor not in logged:
            raise UsageError(
                f"EarlyStopping: monitor={callback.monitor!r} was not logged; these were: {', '.join(sorted(logged))}"
            )
