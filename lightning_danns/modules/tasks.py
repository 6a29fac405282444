"""Tasks: a loss, metrics, which of them is best, and the likelihood that measures of information ask for."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import R2Score

from lightning_danns.errors import UsageError
from lightning_danns.layers import dale_layers
from lightning_danns.modules.arguments import NOT_SAVED, restored, was_lost
from lightning_danns.modules.base import DaleLightningModule
from lightning_danns.modules.resume import attached

Loss = Callable[[Tensor, Tensor], Tensor]


class Task(DaleLightningModule):
    """Learns targets from inputs. A task overrides what differs:

    `step`, which makes outputs, targets and loss of a batch (here a pair of inputs and targets); `likelihood`; `check`
    and `check_inputs`, which refuse wrong batches; and ``best``. Every epoch logs ``train_loss``, ``val_loss``,
    ``test_loss`` and the metrics under the same prefixes; of several loaders, the second counts as ``val_1`` and so on.

    Args:
        loss: a function of outputs and targets; the mean over the batch.
        metrics: torchmetrics of outputs and targets, by the name they are logged under, besides the loss.
        kwargs: see `DaleLightningModule`.
    """

    def __init__(self, loss: Callable | None = None, metrics: dict[str, Metric] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        loss = None if was_lost(loss, "loss") else restored(loss)
        if isinstance(loss, type):
            loss = loss()
        self.loss: Loss = F.mse_loss if loss is None else loss
        self.template = (dict(self.default_metrics()) | _only_metrics(metrics or {}),)  # no submodule, in a tuple
        self.metrics = nn.ModuleDict()

    def default_metrics(self) -> dict[str, Metric]:
        """Metrics of this task, by name."""
        return {}

    def step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, targets and loss of one batch."""
        inputs, targets = batch
        outputs = self(inputs)
        return outputs, targets, self.loss(outputs, targets)

    def likelihood(self, outputs: Tensor) -> Distribution:
        """p(target | outputs), which Fisher information is of.

        Raises:
            UsageError: this task has none.
        """
        raise UsageError(f"{type(self).__name__} has no likelihood: Fisher information needs one (override likelihood)")

    def check(self, batch: Any) -> None:
        """Refuse a batch that would train to wrong numbers; asked for the first of every epoch and loader."""
        self.check_inputs(batch[0])

    def check_inputs(self, inputs: Any) -> None:
        """The part of `check` that predictions ask for too; here, inputs of the precision of the weights."""
        weight = next(self.parameters(), None)
        if isinstance(inputs, Tensor) and weight is not None and inputs.dtype != weight.dtype:
            raise UsageError(
                f"inputs of {inputs.dtype} for weights of {weight.dtype}: convert them "
                f"({'images.float() / 255' if inputs.dtype == torch.uint8 else f'x.to({weight.dtype})'})"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.counted(batch, batch_idx, "train")
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, "update_fisher"):  # DiagonalNGD, and others that learn from per-sample gradients
                optimizer.update_fisher(self.network, batch[0], likelihood=self.likelihood)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.counted(batch, batch_idx, self._stage("val", self.trainer.val_dataloaders, dataloader_idx))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.counted(batch, batch_idx, self._stage("test", self.trainer.test_dataloaders, dataloader_idx))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Outputs for the inputs of a batch."""
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        if batch_idx == 0:
            self.check_inputs(inputs)
        return self(inputs)

    def counted(self, batch: Any, batch_idx: int, stage: str) -> Tensor:
        """Loss of one batch, counted into the metrics of ``stage``; the first batch of an epoch starts them anew."""
        of_stage = self.metrics_of(stage)
        if batch_idx == 0:
            self.check(batch)
            for metric in of_stage.values():  # of an earlier epoch; a fit that goes on within one starts later
                metric.reset()
        outputs, targets, loss = self.step(batch)
        of_stage["loss"].update(loss.detach().expand(len(targets)))  # once for each: it takes no weights without NaN
        of_stage["scores"].update(outputs.detach(), targets)
        return loss

    def metrics_of(self, stage: str) -> Any:
        """Loss and scores of ``train``, ``val``, ``test``, ..., counted since the start of their epoch."""
        name = f"of_{stage}"  # a ModuleDict has an attribute train
        if name not in self.metrics:
            (template,) = self.template
            scores = MetricCollection(dict(copy.deepcopy(template)))
            # a loss of NaN is logged as NaN; looking for it would stop a GPU at each step
            counts = nn.ModuleDict({"loss": MeanMetric(nan_strategy="disable"), "scores": scores})
            self.metrics[name] = counts.to(self.device)
        return self.metrics[name]

    @staticmethod
    def _stage(stage: str, loaders: Any, index: int) -> str:
        if isinstance(loaders, Mapping):
            return str(list(loaders)[index])
        return f"{stage}_{index}" if index else stage

    def log_epoch(self, stages: Sequence[str]) -> None:
        """Log what the metrics of ``stages`` have counted in an epoch."""
        for stage in stages:
            for name, (place, metric) in self._logged(stage).items():  # Lightning looks for metrics itself only once
                attribute = f"metrics.of_{stage}.{place}"
                self.log(name, metric, prog_bar=True, logger=stage != "train", metric_attribute=attribute)

    def _logged(self, stage: str) -> dict[str, tuple[str, Metric]]:
        """By the name that it is logged under, the place of each metric in those of ``stage``, and itself."""
        modules = self.metrics_of(stage).named_modules()
        found = {place: metric for place, metric in modules if isinstance(metric, Metric)}
        return {f"{stage}_{place.rpartition('.')[2]}": (place, metric) for place, metric in found.items()}

    def on_train_epoch_end(self) -> None:
        self.log_epoch(["train"])
        # written here, because Lightning does it after the epoch's checkpoint: a run killed in between would lack a row
        row = {name: float(metric.compute()) for name, (_, metric) in self._logged("train").items()}
        for logger in self.loggers:
            logger.log_metrics({**row, "epoch": self.current_epoch}, self.global_step - 1)
            logger.save()
        super().on_train_epoch_end()

    def on_validation_epoch_end(self) -> None:
        loaders = self.trainer.val_dataloaders
        self.log_epoch([self._stage("val", loaders, k) for k in range(_count(loaders))])

    def on_test_epoch_end(self) -> None:
        loaders = self.trainer.test_dataloaders
        self.log_epoch([self._stage("test", loaders, k) for k in range(_count(loaders))])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the metrics of a training epoch have counted so far, in all processes."""
        super().on_save_checkpoint(checkpoint)
        logged = self._logged("train").values()
        checkpoint["train_metrics"] = {place: _counts(metric) for place, metric in logged}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if not isinstance(self.loss, nn.Module):  # a checkpoint could not keep it, but has its buffers
            for name in [name for name in checkpoint.get("state_dict", {}) if name.startswith("loss.")]:
                del checkpoint["state_dict"][name]
        if attached(self) and self.global_rank == 0:  # the counts are those of all processes
            metrics = dict(self._logged("train").values())
            for place, counts in checkpoint.get("train_metrics", {}).items():
                for name, value in counts.items() if place in metrics else ():
                    setattr(metrics[place], name, move_data_to_device(value, self.device))


class Classification(Task):
    """Classes from logits (N, num_classes): cross-entropy, accuracy; best is the highest ``val_accuracy``.

    Targets are class indices (N,), or soft labels (N, num_classes) of floats whose highest counts as the class.

    Args:
        num_classes: number of classes, at least 2. The command line takes it from the data.
        label_smoothing: share of each target that is spread over all classes, while training.
        top_k: also log ``accuracy_topK`` for these K.
        loss: instead of cross-entropy; of logits and targets.
        metrics, kwargs: see `Task`.

    Raises:
        UsageError: an argument out of range; a batch whose labels or inputs are of a wrong kind.
    """

    best = ("val_accuracy", "max")

    def __init__(
        self,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        top_k: Sequence[int] = (),
        loss: Callable | None = None,
        **kwargs: Any,
    ) -> None:
        if num_classes < 2:
            raise UsageError(f"num_classes={num_classes}: a softmax over one class is always 1; give at least 2")
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"label_smoothing={label_smoothing}: give a share from 0 to below 1")
        if not all(1 <= k < num_classes for k in top_k):
            raise UsageError(f"top_k={list(top_k)}: each must be from 1 to below num_classes={num_classes}")
        self.num_classes, self.label_smoothing, self.top_k = num_classes, label_smoothing, tuple(top_k)
        super().__init__(loss=self._cross_entropy if loss is None else loss, **kwargs)

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing if self.training else 0.0)

    def default_metrics(self) -> dict[str, Metric]:
        def accuracy(k: int) -> Metric:
            return MulticlassAccuracy(self.num_classes, top_k=k, average="micro", validate_args=False)

        return {"accuracy": accuracy(1), **{f"accuracy_top{k}": accuracy(k) for k in self.top_k}}

    def step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, targets, loss = super().step(batch)
        return logits, targets.argmax(-1) if targets.is_floating_point() else targets, loss

    def likelihood(self, outputs: Tensor) -> Distribution:
        """The softmax of the logits."""
        return Categorical(logits=outputs, validate_args=False)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities, (batch, num_classes)."""
        return super().predict_step(batch, batch_idx, dataloader_idx).softmax(-1)

    def check(self, batch: Any) -> None:
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise UsageError(f"a batch of type {type(batch).__name__}: give a pair of inputs and labels")
        inputs, labels = batch
        shape, kind = tuple(labels.shape), labels.dtype
        if labels.is_floating_point():
            if labels.dim() != 2 or shape[1] != self.num_classes:
                raise UsageError(
                    f"labels of shape {shape} and {kind}: class indices are whole numbers (labels.long()), soft labels "
                    f"have shape (N, {self.num_classes})"
                )
        elif labels.dim() > 1:
            raise UsageError(
                f"labels of shape {shape} and {kind}: give one class index for each input (one-hot: labels.argmax(-1))"
                "; data with a list of order_seed serve a batch for each seed, to ReplicatedClassifier alone"
            )
        elif kind != torch.int64:
            raise UsageError(f"labels of {kind}: give class indices as torch.int64 (labels.long())")
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise UsageError(
                f"labels from {int(labels.min())} to {int(labels.max())}: the {self.num_classes} classes are numbered "
                f"from 0 to {self.num_classes - 1}"
            )
        self.check_inputs(inputs)


class ImageClassifier(Classification):
    """Classification of images; networks are made for their shape.

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
        kwargs: see `Classification`.
    """

    def __init__(self, input_shape: Sequence[int] = (1, 28, 28), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.input_shape = tuple(input_shape)

    def check_inputs(self, inputs: Any) -> None:
        """Refuse what is no pixel in [0, 1], in controls too, which are compared on the same images."""
        super().check_inputs(inputs)
        lowest, highest = (float(x) for x in inputs.detach().aminmax()) if inputs.numel() else (0.0, 0.0)
        if lowest < 0 and not any(dale_layers(self)):  # signed layers say themselves what reaches them (DaleProjection)
            raise UsageError(
                f"the images have an input of {lowest:.4g}, but inputs must be >= 0: give pixels in [0, 1] (not "
                "normalised by mean and std), or override check_inputs"
            )
        if highest > BRIGHTEST:
            raise UsageError(f"pixels up to {highest:.4g}: scale them to [0, 1], as x / 255 does")


BRIGHTEST = 16.0
"""Pixels above this are taken for bytes that somebody forgot to divide by 255."""


class Regression(Task):
    """Real targets of the outputs' shape: mean squared error, R²; best is the lowest ``val_loss``.

    Args:
        loss: instead of the mean squared error.
        metrics, kwargs: see `Task`.

    Raises:
        UsageError: targets of another shape than the outputs, which would broadcast.
    """

    best: ClassVar = ("val_loss", "min")

    def default_metrics(self) -> dict[str, Metric]:
        return {"r2": R2Score()}

    def step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, targets = batch
        outputs = self(inputs)
        if outputs.shape != targets.shape:
            raise UsageError(
                f"targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}: give both one "
                "shape (targets[:, None] for a single output)"
            )
        return outputs, targets, self.loss(outputs, targets)

    def likelihood(self, outputs: Tensor) -> Distribution:
        """Gaussian of variance 1 around the outputs, whose negative logarithm is half the squared error."""
        return Normal(outputs, 1.0, validate_args=False)


def _only_metrics(metrics: Mapping[str, Any]) -> dict[str, Metric]:
    kept = {name: m for name, m in metrics.items() if not (isinstance(m, Mapping) and NOT_SAVED in m)}
    if "loss" in metrics:
        raise UsageError("metrics['loss']: the loss is logged under that name; give the metric another")
    made = {name: restored(metric) for name, metric in kept.items()}
    made = {
        name: metric() if not isinstance(metric, Metric) and callable(metric) else metric
        for name, metric in made.items()
    }
    for name, metric in made.items():
        if not isinstance(metric, Metric):
            raise UsageError(f"metrics[{name!r}] is a {type(metric).__name__}: give a torchmetrics Metric")
    return made


def _count(loaders: Any) -> int:
    return len(loaders) if isinstance(loaders, Sequence | Mapping) else int(loaders is not None)


def _counts(metric: Metric) -> dict[str, Any]:
    with metric.sync_context():  # over all processes
        return copy.deepcopy(metric.metric_state)
