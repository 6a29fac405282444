"""Starts of a new network: from its first batch, or with stronger excitation and inhibition."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_danns.callbacks.conflicts import refuse_twice
from lightning_danns.errors import UsageError
from lightning_danns.layers import dale_layers, standardise_, strengthen_


class StandardisedStart(pl.Callback):
    """Centres and standardises the layers of a new network over its first batch, before a step (`standardise_`).

        python train.py fit --config configs/quickstart.yaml --trainer.callbacks+=StandardisedStart

    Several processes standardise over all their parts of the batch. A fit that goes on is past its first step, and is
    left alone. Factors that are measured are those of the network as it was made.

    Raises:
        UsageError: the network was trained or standardised already, so that a layer's b is not 0; see `standardise_`.
    """

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step or batch_idx:
            return
        _refuse_trained(pl_module, self)
        x = trainer.precision_plugin.convert_input(batch if isinstance(batch, Tensor) else batch[0])

        def over_processes(values: Tensor) -> Tensor:
            return torch.as_tensor(trainer.strategy.reduce(values, reduce_op="mean"))

        with trainer.precision_plugin.forward_context():
            standardise_(pl_module, x, over_processes)


class StrongStart(pl.Callback):
    """Starts a new network with stronger excitation and inhibition, which cancel (`strengthen_`).

        python train.py fit --config configs/cifar10/dann_resnet20_batchnorm.yaml --trainer.callbacks+=StrongStart

    It acts as training starts, before a first batch and what that measures. A fit that goes on is past its first step,
    and is left alone.

    Raises:
        UsageError: the network was trained or standardised already, so that a layer's b is not 0; there are two of this
            callback; see `strengthen_`.
    """

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_twice(trainer, self)
        if not trainer.global_step:
            _refuse_trained(pl_module, self)
            strengthen_(pl_module, self.factor)


def _refuse_trained(module: pl.LightningModule, start: pl.Callback) -> None:
    for name, layer in dale_layers(module):
        b = getattr(layer, "b", None)
        if isinstance(b, Tensor) and bool((b != 0).any()):
            raise UsageError(
                f"{name}.b is not 0, so the network is not new: {type(start).__name__} is for new ones. Leave the "
                "callback out"
            )
