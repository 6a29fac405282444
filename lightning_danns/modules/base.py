"""Any network under Dale's principle as a LightningModule: parameter groups, projection, plain arguments. No task."""

import inspect
import os
from functools import partial
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_danns.callbacks import DaleProjection, DecayToInhibition, FisherMonitor, refuse_unprojected
from lightning_danns.callbacks.conflicts import refuse_conflicts, refuse_unlogged
from lightning_danns.errors import UsageError
from lightning_danns.modules.arguments import function_of, keep_plain, made_of, plain
from lightning_danns.modules.resume import CONSTANTS, constants_of, refuse_compiled, refuse_misfit
from lightning_danns.modules.schedule import scheduled, step_plateaus
from lightning_danns.modules.shards import share_out
from lightning_danns.optim import DecayTo, correction_of, fisher_optimizer, fisher_param_groups, measured


class DaleLightningModule(pl.LightningModule):
    """Trains ``self.network`` under Dale's principle where it has signed layers. A task on top says the loss.

    Subclass it, set ``self.network`` and write ``training_step``, or start from a task (`lightning_danns.modules`).
    What a constructor was given is kept as plain values (``hparams``), so that a checkpoint loads by its path alone.

    Args:
        optimizer: a function from parameter groups to a torch optimizer: ``partial(torch.optim.SGD, lr=0.1)``.
        lr_scheduler: a function from an optimizer to a scheduler; stepped once an epoch unless it has an attribute
            ``interval = "step"``. An argument ``total`` that it lacks is the length of the fit.
        correction: learning-rate factors: ``"fisher"`` (published), ``"steady"`` (these, Wix slower still),
            ``"measured"`` on the first batch, ``"none"``, a function from the module to factors by parameter name, or
            such factors.
        rates: base rates of parts of the module relative to the optimizer's, by prefix of name: ``{"network.0": 0.1}``.
        weight_decay: of weights alone, not of biases, gains and log gains; if not given, the optimizer's, of all.
        decay_to: what it leads excitatory weights to: ``"zero"``, or ``"inhibition"``, that which each of them meets.
            It is then Wex - Wei Wix that decays, as W of an ordinary layer (`DecayToInhibition`).

    Attributes:
        best: the metric by which one epoch is better than another, and whether it should be high (``"max"``) or low.
    """

    network: nn.Module
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("val_loss", "min")

    def __init__(
        self,
        # a lambda, because the command line reads the default from its source and shows it in config.yaml
        optimizer: OptimizerCallable = lambda groups: torch.optim.SGD(groups, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        correction: Any = "fisher",
        rates: dict[str, float] | None = None,
        weight_decay: float | None = None,
        decay_to: DecayTo = "zero",
    ) -> None:
        super().__init__()
        by_default = optimizer is inspect.signature(DaleLightningModule).parameters["optimizer"].default
        self.save_hyperparameters(logger=False, ignore=["optimizer"] if by_default else [])
        if by_default:
            optimizer = partial(torch.optim.SGD, lr=0.1)  # which processes that are spawned can get a copy of
        keep_plain(self)
        self.optimizer_factory = made_of(optimizer, "optimizer", "partial(torch.optim.SGD, lr=0.1)")
        self.lr_scheduler_factory = lr_scheduler and made_of(lr_scheduler, "lr_scheduler", "WarmupCosine")
        self.correction = correction_of(function_of(correction, "correction", "'fisher'"))
        self.rates, self.weight_decay, self.decay_to = rates, weight_decay, decay_to

    def forward(self, x: Tensor) -> Tensor:
        network = getattr(self, "network", None)
        if network is None:
            raise UsageError(f"{type(self).__name__} has no self.network: set it in __init__, or override forward")
        return network(x)

    def configure_model(self) -> None:
        """Under a `ModelParallelStrategy`, share each part of the network out among the processes (FSDP2)."""
        if self.device_mesh is not None:
            share_out(self.network, self.device_mesh["data_parallel"])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups with learning-rate factors; a subclass may return other ones (`fisher_param_groups`)."""
        return fisher_param_groups(
            self, self.correction, rates=self.rates, weight_decay=self.weight_decay, decay_to=self.decay_to
        )

    def configure_optimizers(self) -> Any:
        """The optimizer over the parameter groups, and its scheduler if one is given."""
        optimizer = fisher_optimizer(self.optimizer_factory, self.parameter_groups())
        if self.lr_scheduler_factory is None:
            return optimizer
        return scheduled(self, self.lr_scheduler_factory, optimizer)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):  # which steps by the epoch's metrics, below
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        step_plateaus(self)
        refuse_unlogged(self.trainer)

    def configure_callbacks(self) -> list[pl.Callback]:
        """`DaleProjection`, and where arguments ask for them `FisherMonitor` and `DecayToInhibition`; what the Trainer
        has already is left out."""
        asked = {FisherMonitor: self.correction is measured, DecayToInhibition: self.decay_to == "inhibition"}
        wanted = [DaleProjection, *(kind for kind, is_asked in asked.items() if is_asked)]
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        refuse_conflicts(self, present)
        return [kind() for kind in wanted if not any(isinstance(callback, kind) for callback in present)]

    def on_fit_start(self) -> None:
        """Tell the loggers what is trained: class, seed and arguments."""
        refuse_compiled(self)
        described = {"class": f"{type(self).__module__}.{type(self).__qualname__}", **self.hparams}
        for logger in self.loggers:
            logger.log_hyperparams({"seed": os.environ.get("PL_GLOBAL_SEED"), **described})

    def on_train_start(self) -> None:
        """Refuse to train signed layers that nothing projects."""
        refuse_unprojected(self, self.trainer.callbacks)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep arguments as plain values, those too that a subclass has saved itself, and the layers' constants."""
        checkpoint[CONSTANTS] = constants_of(self)
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = plain(dict(self.hparams))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another network's weights or another optimizer's state before torch does, and say what differs."""
        usual = type(self).configure_optimizers is DaleLightningModule.configure_optimizers
        refuse_misfit(self, checkpoint, optimizer=usual)
