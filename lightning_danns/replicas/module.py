"""A classifier that is many: one from every seed with every learning rate, trained in one process."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric

from lightning_danns.analysis.activity import evaluating
from lightning_danns.atomic import replacing
from lightning_danns.callbacks import DaleDiagnostics, DaleProjection, refuse_conflicts
from lightning_danns.errors import UsageError
from lightning_danns.modules.arguments import restored
from lightning_danns.modules.tasks import ImageClassifier
from lightning_danns.replicas.checkpoint import ReplicaCheckpoint, ReplicaProjection
from lightning_danns.replicas.making import ClassifierFactory, make_replica
from lightning_danns.replicas.stacks import Stacks

COUNTED_AT_ONCE = 32
"""Batches that wait until the metrics of the replicas, one after the other, are updated with all of them."""


class ReplicatedClassifier(ImageClassifier):
    """Trains one classifier from every seed with every learning rate, all at once in one process.

    Each replica is an ordinary classifier, whose parameters are slices of stacked tensors. Its ``step`` runs once on
    the stacks (`torch.vmap`), whatever its loss; groups, optimizer and projection act on the ordinary parameters. The
    sum of all losses is minimised, so nothing passes between replicas, and each ends as the single run of its seed and
    learning rate on the same batches does, up to rounding (dropout draws other numbers).

    Replica k * len(seeds) + s has ``learning_rates[k]`` and ``seeds[s]``. Logs each metric of the classifier for every
    replica (``val_accuracy/0``, ...) and as their mean. `ReplicaCheckpoint` saves replicas and a table of metrics.

    All replicas see the same batches, images (N, ...) and labels (N,), or those of their seed, images
    (len(seeds), N, ...) and labels (len(seeds), N), as `ImageDataModule` serves them with a list of ``order_seed``.

    Args:
        classifier: makes one of the replicas: the class, or ``functools.partial(DANNMLP, hidden_sizes=[100, 100])``.
        seeds: of the first weights; replicas of equal seeds start equal.
        learning_rates: base learning rates, instead of the one of the classifier's optimizer.
        input_shape, num_classes: see `ImageClassifier`; those of the classifier if not given.

    Attributes:
        replicas: the classifiers; `replica` gives a copy of one.
        history: a row for each epoch and replica of this fit: epoch, number, seed, learning rate, metrics.

    Shape:
        images (N, ...) -> logits (N, len(replicas), num_classes).

    Raises:
        UsageError: no or equal seeds or rates; a classifier without network, or with steps or hooks that replicas do
            not run; a Trainer, optimizer or scheduler that would tie the replicas to each other.

    Example:
        >>> import functools
        >>> from lightning_danns import DANNMLP
        >>> small = functools.partial(DANNMLP, hidden_sizes=[20])
        >>> model = ReplicatedClassifier(small, seeds=[0, 1, 2], learning_rates=[0.05, 0.1])
        >>> model(torch.rand(32, 1, 28, 28)).shape
        torch.Size([32, 6, 10])
        >>> model.replica(4)(torch.rand(32, 1, 28, 28)).shape
        torch.Size([32, 10])
    """

    replicas: Sequence[ImageClassifier]

    def __init__(
        self,
        classifier: ClassifierFactory,
        seeds: list[int],
        learning_rates: list[float] | None = None,
        input_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
    ) -> None:
        seeds, rates = list(seeds), None if learning_rates is None else list(learning_rates)
        for name, values in (("seeds", seeds), ("learning_rates", rates)):
            if values is not None and (not values or len(set(values)) < len(values)):
                raise UsageError(f"{name}={values}: give at least one, and none twice")
        if rates is not None and not all(0 < rate < float("inf") for rate in rates):
            raise UsageError(f"learning_rates={rates}: all must be positive")
        data = {"input_shape": input_shape, "num_classes": num_classes}
        make = functools.partial(make_replica, restored(classifier), {k: v for k, v in data.items() if v is not None})
        replicas = [make(seed, rate) for rate in rates or [None] for seed in seeds]  # type: ignore[list-item]
        first = replicas[0]
        factories = {"optimizer": first.optimizer_factory, "lr_scheduler": first.lr_scheduler_factory}
        super().__init__(first.input_shape, num_classes=first.num_classes, **factories)
        self.best = first.best  # type: ignore[misc]
        self.template = ({name: MeanMetric(nan_strategy="disable") for name in first.template[0]},)
        self.seeds, self.learning_rates = seeds, rates
        self.replicas = nn.ModuleList(replicas)  # type: ignore[assignment]
        self.stacks = Stacks(replicas)
        self.history: list[dict[str, Any]] = []
        self._newest: dict[str, list[float]] = {}
        self._uncounted: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def replica(self, index: int) -> ImageClassifier:
        """A copy of one replica: an ordinary classifier, with the weights of this moment."""
        return copy.deepcopy(self.replicas[index])

    def settings(self, index: int) -> dict[str, Any]:
        """Seed and, if given, learning rate of a replica."""
        k, s = divmod(index, len(self.seeds))
        rate = {} if self.learning_rates is None else {"learning_rate": self.learning_rates[k]}
        return {"seed": self.seeds[s], **rate}

    def table(self) -> list[dict[str, Any]]:
        """A row for each replica: its number, its settings, and its metrics logged since the last epoch of training."""
        return [
            {"replica": index, **self.settings(index), **{name: values[index] for name, values in self._newest.items()}}
            for index in range(len(self.replicas))
        ]

    def save_replica(self, index: int, path: str | Path) -> None:
        """Write a checkpoint of one replica, as its own Trainer would without the state of the optimizer."""
        replica, path = self.replicas[index], Path(path)
        checkpoint = {
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "pytorch-lightning_version": pl.__version__,
            "state_dict": {name: value.contiguous().clone() for name, value in replica.state_dict().items()},
            self.CHECKPOINT_HYPER_PARAMS_KEY: dict(replica.hparams),
        }
        self._count("train")
        replica.on_save_checkpoint(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, partial=f".{path.name}.partial") as file:
            torch.save(checkpoint, file)

    def forward(self, images: Tensor) -> Tensor:
        return self.stacks.call("forward", images).transpose(0, 1)

    def step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What the replicas' own ``step`` makes of a batch: outputs (R, N, ...), targets (R, N), losses (R,)."""
        own = self._by_seed(batch)
        if own:
            copies = len(self.replicas) // len(self.seeds)
            batch = [of_seeds.repeat(copies, *(1 for _ in of_seeds.shape[1:])) for of_seeds in batch]
        kind = type(self.replicas[0]).__name__
        try:
            outputs, targets, losses = self.stacks.call("step", batch, own=own)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise UsageError(f"{kind}.step or its loss cannot run for many replicas at once: {error}") from error
        if losses.dim() != 1:
            raise UsageError(f"the loss of {kind} has shape {tuple(losses.shape[1:])}: it must be one number, the mean")
        return outputs, targets, losses

    def check(self, batch: Any) -> None:
        by_seed = self._by_seed(batch)
        for of_seed in zip(*batch, strict=True) if by_seed else [batch]:
            self.replicas[0].check(of_seed)
        self._compare(batch[0][0] if by_seed else batch[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities of all replicas, (batch, len(replicas), num_classes)."""
        if batch_idx == 0:
            self._compare(batch if isinstance(batch, Tensor) else batch[0])
        return super().predict_step(batch, batch_idx, dataloader_idx)

    def _by_seed(self, batch: Any) -> bool:
        """Whether a batch has one of its own for each seed."""
        images = batch[0] if isinstance(batch, Sequence) else batch
        if not isinstance(images, Tensor) or images.dim() != len(self.input_shape) + 2:
            return False
        if len(images) != len(self.seeds):
            raise UsageError(
                f"images of shape {tuple(images.shape)}: a batch of their own for each of {len(self.seeds)} seeds has "
                f"shape ({len(self.seeds)}, N, {', '.join(map(str, self.input_shape))}); check the list order_seed"
            )
        return True

    @torch.no_grad()
    def _compare(self, images: Tensor) -> None:
        """Run the replicas one by one too: for hooks on their layers, which refuse negative inputs and do not act on
        stacks, and to refuse a classifier that computes something else there."""
        with evaluating(self):
            for together, replica in zip(self(images).unbind(1), self.replicas, strict=True):
                if self.global_step > 0 and not bool(together.isfinite().all()):
                    continue  # it has diverged
                alone = replica(images)
                if self.global_step == 0 and bool((alone - together).norm() > 0.1 * alone.norm()):
                    raise UsageError(
                        f"{type(replica).__name__} computes other outputs in a stack than alone: replicas may differ "
                        "in parameters and buffers alone (register_buffer keeps other tensors)"
                    )

    def counted(self, batch: Any, batch_idx: int, stage: str) -> Tensor:
        if batch_idx == 0:
            self.check(batch)
            self._uncounted[stage] = []
            for replica in self.replicas:
                for metric in replica.metrics_of(stage).values():
                    metric.reset()
        outputs, targets, losses = self.step(batch)
        self._uncounted.setdefault(stage, []).append((outputs.detach(), targets, losses.detach()))
        if len(self._uncounted[stage]) == COUNTED_AT_ONCE:
            self._count(stage)
        return losses.sum()

    def _count(self, stage: str) -> None:
        batches = self._uncounted.pop(stage, [])
        if not batches:
            return
        outputs, targets = (torch.cat(parts, 1) for parts in list(zip(*batches, strict=True))[:2])
        losses = torch.stack([losses for _, _, losses in batches])  # (batches, R)
        sizes = torch.tensor([targets.shape[1] for _, targets, _ in batches], device=losses.device)
        for k, replica in enumerate(self.replicas):
            replica.metrics_of(stage)["loss"].update(losses[:, k], sizes)
            replica.metrics_of(stage)["scores"].update(outputs[k], targets[k])

    def log_epoch(self, stages: Sequence[str]) -> None:
        for stage in stages:
            self._count(stage)
            for place, mean in self.metrics_of(stage).named_modules():
                if isinstance(mean, Metric):
                    of_each = [replica.metrics_of(stage).get_submodule(place) for replica in self.replicas]
                    values = torch.stack([metric.compute() for metric in of_each])
                    mean.reset()
                    mean.update(values)
                    name = f"{stage}_{place.rpartition('.')[2]}"
                    self.log_dict({f"{name}/{k}": value for k, value in enumerate(values)})
                    if not self.trainer.sanity_checking:
                        self._newest[name] = values.tolist()
        super().log_epoch(stages)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.history += [{"epoch": self.current_epoch, **row} for row in self.table()]
        self._newest = {}

    def on_train_start(self) -> None:
        for replica in self.replicas:
            replica.on_train_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history, and what the metrics of all replicas have counted so far."""
        self._count("train")
        of_each: list[dict[str, Any]] = [{} for _ in self.replicas]
        for replica, own in zip(self.replicas, of_each, strict=True):
            replica.on_save_checkpoint(own)
        checkpoint["replicas"] = {"history": self.history, "newest": self._newest, "of_each": of_each}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["replicas"]
        self.history, self._newest = list(kept["history"]), dict(kept["newest"])
        for replica, own in zip(self.replicas, kept["of_each"], strict=True):
            replica.on_load_checkpoint(own)

    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        if trainer.world_size > 1:
            raise UsageError("replicas train in one process: use devices=1, and several runs for several GPUs")
        if stage == "fit" and trainer.gradient_clip_val:
            given = f"gradient_clip_val={trainer.gradient_clip_val}"
            raise UsageError(f"{given} clips the gradient of all replicas together: use LayerGradientClipping")
        if stage == "fit" and trainer.precision == "16-mixed":
            raise UsageError("with precision 16-mixed, a step that one replica skips is lost to all: use bf16-mixed")
        if any(isinstance(callback, DaleDiagnostics) for callback in trainer.callbacks):
            raise UsageError("DaleDiagnostics looks at the layers of one network, which replicas stack: fit one alone")
        self._newest, self._uncounted = {}, {}
        if stage == "fit":
            self.history = []
        self.stacks.template.trainer = trainer
        for replica in self.replicas:
            replica.trainer = trainer
            replica.setup(stage)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The groups of the replicas, those of one kind and learning rate as one."""
        merged: dict[Any, dict[str, Any]] = {}
        for index, replica in enumerate(self.replicas):
            rate = self.settings(index).get("learning_rate")
            for group in replica.parameter_groups():
                if rate is not None:
                    name, base = (f"{group[key]}/lr={rate}" for key in ("name", "base"))
                    group |= {"name": name, "base": base, "lr": rate * group.get("base_rate", 1.0) * group["lr_scale"]}
                group["signed"] = [f"replicas.{index}.{name}" for name in group["signed"]]
                options = {key: value for key, value in group.items() if key not in ("params", "signed")}
                same = merged.setdefault(repr(options), {**options, "params": [], "signed": []})
                for key in ("params", "signed"):
                    same[key] += group[key]
        names = [group["name"] for group in merged.values()]
        for k, group in enumerate(merged.values()):
            if names.count(group["name"]) > 1:  # a correction that differs from replica to replica
                group["name"] += f"/{k}"
        return list(merged.values())

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        if hasattr(optimizer, "update_fisher"):
            raise UsageError(f"{type(optimizer).__name__} estimates the Fisher information of one network, not of many")
        if isinstance(configured, dict) and isinstance(configured["lr_scheduler"]["scheduler"], ReduceLROnPlateau):
            raise UsageError("ReduceLROnPlateau follows one validation loss, and would tie the replicas to each other")
        return configured

    def configure_callbacks(self) -> list[pl.Callback]:
        """`ReplicaProjection` instead of `DaleProjection`, and `ReplicaCheckpoint` where the Trainer writes."""
        present: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        refuse_conflicts(self, present)
        projected = any(isinstance(c, DaleProjection) and type(c) is not DaleProjection for c in present)
        writes = self.trainer.checkpoint_callbacks or (self.trainer.testing and self.trainer.loggers)
        saved = any(isinstance(c, ReplicaCheckpoint) for c in present) or not writes
        return [*([] if projected else [ReplicaProjection()]), *([] if saved else [ReplicaCheckpoint()])]
