"""What every experiment shares: arguments -> network -> one step -> optimizers -> callbacks."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_danns.callbacks import DaleProjection
from lightning_danns.errors import UsageError
from lightning_danns.layers import dale_layers
from lightning_danns.monitoring import FisherMonitor
from lightning_danns.optim import (
    fisher_optimizer,
    fisher_param_groups,
    rehearse_scheduler,
)


def metric_names(stage: str) -> tuple[str, str]:
    """What the metrics of ``train``, ``val`` or ``test`` are logged as."""
    return f"{stage}_loss", f"{stage}_accuracy"


class ImageClassifier(pl.LightningModule):
    """Trains ``self.network`` to classify images by cross-entropy, under Dale's principle where it has signed layers.

    Logs loss and accuracy of each epoch as ``train_loss``, ``train_accuracy``, ``val_loss``, ... A subclass sets
    ``self.network`` after ``super().__init__(...)`` and inherits the rest:

    Example:
        >>> from lightning_danns import DANNLinear
        >>> class MyDANN(ImageClassifier):
        ...     def __init__(self, width: int = 200, **kwargs):
        ...         super().__init__(**kwargs)
        ...         self.network = nn.Sequential(
        ...             nn.Flatten(),
        ...             DANNLinear(784, width, width // 10, inputs="pixels"),
        ...             nn.ReLU(),
        ...             DANNLinear(width, self.num_classes, 1),
        ...         )
        >>> MyDANN(width=100)(torch.rand(32, 1, 28, 28)).shape
        torch.Size([32, 10])

    Args:
        input_shape: shape of one image, (channels, height, width). The command line takes it from the data.
        num_classes: number of classes. The command line takes it from the data.
        correction: ``"fisher"`` scales the learning rates of inhibitory parameters by the factors that the layers
            declare; ``"measured"`` by factors measured on the first batch (`FisherMonitor`); ``"none"`` leaves them
            alone.
        optimizer: a function from parameter groups to a torch optimizer, e.g.
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        lr_scheduler: a function from an optimizer to a scheduler, stepped once an epoch.
    """

    network: nn.Module

    def __init__(
        self,
        input_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        correction: Literal["fisher", "measured", "none"] = "fisher",
        # a lambda, because the command line reads the default from its source and shows it in config.yaml
        optimizer: OptimizerCallable = lambda groups: torch.optim.SGD(groups, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if correction not in ("fisher", "measured", "none"):
            raise UsageError(f"correction={correction!r}: choose 'fisher', 'measured' or 'none'")
        for name, factory in (("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
            if factory is not None and not callable(factory):
                raise UsageError(f"{name}={factory!r}: give a function such as partial(torch.optim.SGD, lr=0.1)")
        self.save_hyperparameters()
        self.input_shape, self.num_classes = tuple(input_shape), num_classes
        self.correction = correction
        self.optimizer_factory, self.lr_scheduler_factory = optimizer, lr_scheduler
        self._plateau_epoch = -1
        self.metrics: dict[str, Metric] = nn.ModuleDict()  # type: ignore[assignment]
        for stage in ("train", "val", "test"):
            # a loss of NaN is logged as NaN; looking for it would take as long as counting, and stop a GPU at each step
            self.metrics[f"{stage}_loss"] = MeanMetric(nan_strategy="disable")
            self.metrics[f"{stage}_accuracy"] = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def shared_step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Loss of one batch (images, labels); counts it into the metrics of ``stage``."""
        images, labels = batch
        if labels.dim() > 1:
            raise UsageError(
                f"labels of shape {tuple(labels.shape)}: one for each image is needed. Data with a list of order_seed "
                "serve a batch for each seed, to ReplicatedClassifier alone"
            )
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.metrics[f"{stage}_loss"].update(loss.detach().expand(len(labels)))  # once for each image
        self.metrics[f"{stage}_accuracy"].update(logits.detach(), labels)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.shared_step(batch, "train")
        for optimizer in self._trainer.optimizers if self._trainer else []:
            if hasattr(optimizer, "update_fisher"):  # DiagonalNGD, and others that learn from per-sample gradients
                optimizer.update_fisher(self.network, batch[0])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.shared_step(batch, self._validation_stages()[dataloader_idx])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.shared_step(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities, (batch, num_classes)."""
        return self(batch[0]).softmax(-1)

    def on_train_epoch_end(self) -> None:
        # What Lightning would do after the epoch's checkpoint is done before it here: a run that is killed between the
        # two would go on without the logged metrics, and without a step of ReduceLROnPlateau.
        values = {name: float(value) for name, value in self._epoch_metrics("train").items()}
        self._log_epoch("train", logger=False)
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, self.global_step - 1)
            logger.save()
        loop, metrics = self.trainer.fit_loop.epoch_loop, self.trainer.callback_metrics
        monitors = [config.monitor for config in self.trainer.lr_scheduler_configs if config.reduce_on_plateau]
        # a checkpoint made after the validation, by another callback than LastCheckpoint, does not hold its metrics
        lost = self.trainer.fit_loop.restarting and any(monitor not in metrics for monitor in monitors)
        if loop._num_ready_batches_reached() and not lost:  # max_steps or max_time may end a fit within an epoch
            self._plateau_epoch = -1  # that of an earlier fit
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            self._plateau_epoch = self.current_epoch

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        if metric is None or self._plateau_epoch != self.current_epoch:
            super().lr_scheduler_step(scheduler, metric)

    def on_validation_epoch_start(self) -> None:
        # Trainer.validate resets them under inference mode, which makes tensors that a later fit may not write
        for stage in dict.fromkeys(self._validation_stages()):
            for name in metric_names(stage):
                self.metrics[name].reset()

    def on_validation_epoch_end(self) -> None:
        for stage in dict.fromkeys(self._validation_stages()):
            self._log_epoch(stage)

    def _validation_stages(self) -> list[str]:
        """What each validation loader is counted as: by its name, ``val`` or ``test``, or else all as ``val``."""
        loaders = self._trainer.val_dataloaders if self._trainer else None
        if isinstance(loaders, Mapping) and {*loaders} <= {"val", "test"}:
            return list(loaders)
        return ["val"] * (len(loaders) if isinstance(loaders, Sequence | Mapping) else 1)

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _epoch_metrics(self, stage: str) -> dict[str, Tensor]:
        return {name: self.metrics[name].compute() for name in metric_names(stage)}

    def _log_epoch(self, stage: str, logger: bool = True) -> None:
        for name in metric_names(stage):
            self.log(name, self.metrics[name], prog_bar=True, logger=logger)

    def configure_optimizers(self) -> Any:
        """The optimizer over the Fisher-corrected parameter groups, and its scheduler if one is given."""
        optimizer = self._optimizer()
        if self.lr_scheduler_factory is None:
            return optimizer
        rehearse_scheduler(self.lr_scheduler_factory, optimizer)
        scheduler = self.lr_scheduler_factory(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler}
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", "val_loss")
            if self._trainer and config["monitor"].startswith("val_"):
                config["frequency"] = self._trainer.check_val_every_n_epoch or 1
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _optimizer(self) -> torch.optim.Optimizer:
        correction: Any = self.correction
        if correction == "measured":  # each in a group of its own, whatever its factor will be
            correction = {
                f"{layer_name}.{name}": factor
                for layer_name, layer in dale_layers(self)
                for name, factor in layer.lr_factors().items()
            }
        return fisher_optimizer(self.optimizer_factory, fisher_param_groups(self, correction))

    def configure_callbacks(self) -> list[pl.Callback]:
        """`DaleProjection`, and `FisherMonitor` for measured factors; unless the Trainer already has them."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        measured = self.correction == "measured" and not any(isinstance(c, FisherMonitor) for c in callbacks)
        return self._with_projection([FisherMonitor()] if measured else [])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":  # Lightning sets it forty times a step, and Module's way takes two hooks' time
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.configure_callbacks
        if own is not ImageClassifier.configure_callbacks and not hasattr(own, "keeps_projection"):
            # overridden, in the class or a mixin, perhaps without super()

            @functools.wraps(own)
            def configure_callbacks(self: "ImageClassifier") -> list[pl.Callback]:
                callbacks = own(self)
                return self._with_projection(list(callbacks) if isinstance(callbacks, Sequence) else [callbacks])

            configure_callbacks.keeps_projection = True  # type: ignore[attr-defined]
            cls.configure_callbacks = configure_callbacks  # type: ignore[method-assign]

    projection: type[DaleProjection] = DaleProjection

    def _with_projection(self, callbacks: list[pl.Callback]) -> list[pl.Callback]:
        present = [*callbacks, *self.trainer.callbacks]  # type: ignore[attr-defined]
        if any(isinstance(callback, DaleProjection) for callback in present):
            return callbacks
        return [*callbacks, self.projection()]

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """As Lightning's, with two differences that make every checkpoint load from its path alone.

        Only the arguments of the concrete class are kept, not those that it passes to its bases by itself; and no
        callable is, because a checkpoint with one does not load with ``weights_only``.
        """
        frame = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        while (
            frame
            and (outer := frame.f_back)
            and outer.f_code.co_name == "__init__"
            and outer.f_locals.get("self") is self
        ):
            frame = outer
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)
        stored: list[dict[str, Any]] = [self._hparams, self._hparams_initial]  # type: ignore[list-item]
        for hparams in stored:
            for name in [name for name, value in hparams.items() if callable(value)]:
                del hparams[name]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Within an epoch, keep what its metrics have counted in all processes."""
        epochs: Any = self._trainer.fit_loop.epoch_progress.current if self._trainer else None
        if epochs and epochs.processed < epochs.started:
            checkpoint["train_metrics"] = {name: _counts(self.metrics[name]) for name in metric_names("train")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another network's weights or another optimizer's state before torch does, and say what differs."""
        if self._trainer is None:
            return  # load_from_checkpoint, where torch reports what does not fit and strict=False allows it
        if self.strict_loading and "state_dict" in checkpoint:  # sharded strategies load their weights elsewhere
            _refuse_other_network(self, checkpoint)
        if self.trainer.training:
            if "state_dict" in checkpoint and "optimizer_states" not in checkpoint:
                raise UsageError(
                    "the checkpoint holds weights alone (those of a replica do), so a fit cannot continue from it: "
                    "test it, or start anew from its weights (load_from_checkpoint)"
                )
            for state in checkpoint.get("optimizer_states", [])[:1]:
                _refuse_other_optimizer(self._optimizer().param_groups, state["param_groups"], self.correction)
            if self.trainer.is_global_zero:  # the counts are those of all processes
                for name, counts in checkpoint.get("train_metrics", {}).items():
                    for state, value in counts.items():
                        setattr(self.metrics[name], state, value.to(self.device))


def _counts(metric: Metric) -> dict[str, Tensor]:
    with metric.sync_context():  # over all processes
        return {state: value.clone() for state, value in metric.metric_state.items()}  # type: ignore[union-attr]


def _refuse_other_optimizer(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], correction: str) -> None:
    if not all("lr_scale" in group for group in theirs):
        return  # a subclass with groups of its own
    our_scales, their_scales = ({g["name"]: g["lr_scale"] for g in groups} for groups in (ours, theirs))
    if our_scales != their_scales and not (correction == "measured" and our_scales.keys() == their_scales.keys()):
        raise UsageError(
            f"the checkpoint was trained with other learning-rate factors: {len(their_scales)} groups there, "
            f"{len(our_scales)} here. Resume with the same correction, or start anew from its weights "
            "(load_from_checkpoint)"
        )
    missing = set(ours[0]) - set(theirs[0])
    if missing:
        raise UsageError(
            f"the checkpoint was trained with another optimizer, which has no {', '.join(sorted(missing))}. Resume "
            "with the same optimizer, or start anew from its weights (load_from_checkpoint)"
        )


def _refuse_other_network(model: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if ours == theirs:
        return
    name = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
    theirs_hparams = checkpoint.get("hyper_parameters", {})
    different = {k: v for k, v in theirs_hparams.items() if k in model.hparams and v != model.hparams[k]}
    described = ", ".join(f"{key}={value}" for key, value in different.items() if key != "optimizer")
    raise UsageError(
        f"the checkpoint holds another network than this {type(model).__name__}: {name} is "
        f"{ours.get(name, 'absent')} here and {theirs.get(name, 'absent')} there. It was saved by a model with "
        f"{described or 'other layers'}"
    )
