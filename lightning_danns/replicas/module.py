"""Many at once: seeds and learning rates of one small network, trained side by side as one stack of weights."""

import contextvars
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning_danns.monitoring import DaleDiagnostics
from pytorch_lightning.core.hooks import DataHooks, ModelHooks
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torchmetrics import Metric

from lightning_danns.callbacks import ReplicaCheckpoint, ReplicaProjection
from lightning_danns.checkpoints import AtomicCheckpointIO
from lightning_danns.errors import UsageError
from lightning_danns.modules.base import ImageClassifier, metric_names
from lightning_danns.optim import fisher_optimizer, fisher_param_groups

STEPS = (
    *("shared_step", "training_step", "validation_step", "test_step", "predict_step", "backward"),
    *("configure_optimizers", "_optimizer", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"),
    *("configure_callbacks", "configure_gradient_clipping"),
    *(
        name
        for name in (*vars(ModelHooks), *vars(DataHooks))
        if not name.startswith("_") and name not in ("setup", "on_train_start")
    ),
)
"""What a replica does not do by itself, so that a classifier with its own version cannot be replicated."""


class ClassifierFactory(Protocol):
    """Makes one of the replicas; a protocol, so that the command line offers all options of a class but these two."""

    def __call__(self, *, input_shape: Sequence[int], num_classes: int) -> ImageClassifier: ...


class ReplicatedClassifier(ImageClassifier):
    """Trains one classifier from every seed with every learning rate, all at once in one process.

    Each replica is an ordinary classifier with parameters of its own, which are slices of stacked tensors: forward and
    backward run once on the stacks (`torch.vmap`), while optimizer, Fisher factors and projection act on ordinary
    parameters. The loss is the sum of the replicas' losses, so nothing passes between them, and a replica ends as the
    single run of its seed and learning rate on the same batches does, up to rounding (dropout draws other numbers).

    Replica k * len(seeds) + s has ``learning_rates[k]`` and ``seeds[s]``. Logs each metric of `ImageClassifier` for
    every replica (``val_accuracy/0``, ...) and as their mean (``val_accuracy``). `ReplicaCheckpoint` saves every
    replica as a checkpoint of the classifier, and all metrics as one table.

    All replicas see the same batches, images (N, ...) and labels (N,), or those of their seed, images
    (len(seeds), N, ...) and labels (len(seeds), N), as `ImageDataModule` serves them with a list of ``order_seed``.

    Args:
        classifier: makes one of the replicas: the class, or ``functools.partial(DANNMLP, hidden_sizes=[100, 100])``.
        seeds: of the first weights; replicas of equal seeds start equal.
        learning_rates: base learning rates, instead of the one of the classifier's optimizer.
        input_shape, num_classes: see `ImageClassifier`; those of the classifier if not given.

    Attributes:
        replicas: the classifiers; `replica` gives a copy of one.

    Shape:
        images (N, ...) -> logits (N, len(replicas), num_classes).

    Raises:
        UsageError: no or equal seeds or rates; a classifier without network, or with steps or hooks of its own; a
            Trainer, optimizer or scheduler that would tie the replicas to each other.

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
    projection = ReplicaProjection

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
        make = _factory(classifier, {name: value for name, value in data.items() if value is not None})
        every_rate: Sequence[float | None] = rates or [None]
        replicas = [make(seed, rate) for rate in every_rate for seed in seeds]
        first = replicas[0]
        super().__init__(
            first.input_shape, first.num_classes, first.correction, first.optimizer_factory, first.lr_scheduler_factory
        )
        self.seeds, self.learning_rates = seeds, rates
        self.replicas = nn.ModuleList(replicas)  # type: ignore[assignment]
        for name in self.metrics:
            self.metrics[name] = _MeanOfEach(len(replicas))
        # the architecture alone; in a tuple, because it is no part of the model
        self._template = (copy.deepcopy(first).to("meta"),)
        self._stacks: dict[str, _Stack] = {}
        self._met_inputs = False

    def replica(self, index: int) -> ImageClassifier:
        """A copy of one replica: an ordinary classifier, with the weights of this moment."""
        return copy.deepcopy(self.replicas[index])

    def settings(self, index: int) -> dict[str, Any]:
        """Seed and, if given, learning rate of a replica."""
        k, s = divmod(index, len(self.seeds))
        rate = {} if self.learning_rates is None else {"learning_rate": self.learning_rates[k]}
        return {"seed": self.seeds[s], **rate}

    def table(self, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A row for each replica: its number, its settings, and what ``metrics`` has of it (the Trainer's, by name)."""
        return [
            {"replica": index, **self.settings(index)}
            | {name.rpartition("/")[0]: float(metrics[name]) for name in metrics if name.endswith(f"/{index}")}
            for index in range(len(self.replicas))
        ]

    def save_replica(self, index: int, path: str | Path) -> None:
        """Write a checkpoint of one replica, as its own Trainer would without the state of the optimizer."""
        replica, trainer = self.replicas[index], self._trainer
        checkpoint = {
            "epoch": trainer.current_epoch if trainer else 0,
            "global_step": trainer.global_step if trainer else 0,
            "pytorch-lightning_version": pl.__version__,
            "state_dict": {name: value.contiguous().clone() for name, value in replica.state_dict().items()},
            "hparams_name": "kwargs",
            "hyper_parameters": dict(replica.hparams),
        }
        replica.on_save_checkpoint(checkpoint)
        AtomicCheckpointIO().save_checkpoint(checkpoint, path)

    def forward(self, images: Tensor) -> Tensor:
        (template,) = self._template
        template.train(self.training)
        own_batches = images.dim() == len(self.input_shape) + 2
        if own_batches and len(images) != len(self.seeds):
            raise UsageError(
                f"images of shape {tuple(images.shape)}: a batch of their own for each of {len(self.seeds)} seeds has "
                f"shape ({len(self.seeds)}, N, {', '.join(map(str, self.input_shape))}); check the list order_seed"
            )
        if own_batches:
            images = images.repeat(len(self.replicas) // len(self.seeds), *(1 for _ in images.shape[1:]))

        def one(state: dict[str, Tensor], images: Tensor) -> Tensor:
            return functional_call(template, state, (images,))

        all_at_once = vmap(one, in_dims=(0, 0 if own_batches else None), out_dims=1, randomness="different")
        return all_at_once(self._stacked_state(), images)

    def _stacked_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by their name in one replica, with a leading dimension of replicas."""
        if not self._stacks:
            replicas = [dict(replica.named_modules()) for replica in self.replicas]
            (template,) = self._template
            for name, _ in (*template.named_parameters(), *template.named_buffers()):
                owner, _, own_name = name.rpartition(".")
                self._stacks[name] = _Stack([modules[owner] for modules in replicas], own_name)
        return {name: stack.tensor() for name, stack in self._stacks.items()}

    def shared_step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        """Sum of the replicas' losses of one batch; counts them into the metrics of ``stage``."""
        images, labels = batch
        logits = self(images)  # (N, R, classes)
        copies = len(self.replicas) // (len(labels) if labels.dim() == 2 else 1)
        labels = labels.T.repeat(1, copies) if labels.dim() == 2 else labels[:, None].expand(-1, copies)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        self.metrics[f"{stage}_loss"].update(losses.detach())
        self.metrics[f"{stage}_accuracy"].update(logits.detach().argmax(-1) == labels)
        return losses.mean(0).sum()

    def on_train_start(self) -> None:
        for replica in self.replicas:
            replica.on_train_start()

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if self._met_inputs:
            return
        # once one by one, for the hooks by which layers refuse negative inputs: they do not act on stacks
        self._met_inputs = True
        images = batch[0].flatten(0, -len(self.input_shape) - 1)[: batch[1].shape[-1]]
        training = self.training
        self.eval()
        with torch.no_grad():
            for replica in self.replicas:
                replica(images)
        self.train(training)

    def _epoch_metrics(self, stage: str) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for name, values in super()._epoch_metrics(stage).items():
            # torchmetrics makes a scalar of one value
            metrics |= {name: values.mean(), **{f"{name}/{k}": value for k, value in enumerate(values.flatten())}}
        return metrics

    def _log_epoch(self, stage: str, logger: bool = True) -> None:
        for name, value in self._epoch_metrics(stage).items():
            self.log(name, value, prog_bar="/" not in name, logger=logger)
        for name in metric_names(stage):
            self.metrics[name].reset()

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise UsageError(
                "replicas train in one process: use --trainer.devices=1, and several runs for several GPUs"
            )
        if stage == "fit" and self.trainer.gradient_clip_val:
            raise UsageError(
                f"gradient_clip_val={self.trainer.gradient_clip_val} clips the gradient of all replicas together: use "
                "LayerGradientClipping, which clips each layer of each replica"
            )
        if stage == "fit" and self.trainer.precision == "16-mixed":
            raise UsageError("with precision 16-mixed, a step that one replica skips is lost to all: use bf16-mixed")
        if any(isinstance(callback, DaleDiagnostics) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise UsageError(
                "DaleDiagnostics looks at the layers of one network, which replicas compute as one stack: fit one seed "
                "and learning rate by itself to look at it"
            )
        self._stacks, self._met_inputs = {}, False
        for replica in self.replicas:
            replica.trainer = self.trainer
            replica.setup(stage)

    def _optimizer(self) -> torch.optim.Optimizer:
        """One optimizer; its groups are those of a replica, once for each learning rate."""
        groups: dict[str, dict[str, Any]] = {}
        if self.correction == "measured":
            raise UsageError("correction='measured' measures one network, not many: use 'fisher', or single runs")
        for index, replica in enumerate(self.replicas):
            rate = self.settings(index).get("learning_rate")
            for group in fisher_param_groups(replica, self.correction):
                if rate is not None:
                    group |= {"name": f"{group['name']}/lr={rate}", "lr": rate, "base_lr": rate}
                groups.setdefault(group["name"], {**group, "params": []})["params"] += group["params"]
        optimizer = fisher_optimizer(self.optimizer_factory, list(groups.values()))
        if hasattr(optimizer, "update_fisher"):
            raise UsageError(f"{type(optimizer).__name__} estimates the Fisher information of one network, not of many")
        return optimizer

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        if isinstance(configured, dict) and "monitor" in configured["lr_scheduler"]:
            raise UsageError("ReduceLROnPlateau follows one validation loss, and would tie the replicas to each other")
        return configured

    def configure_callbacks(self) -> list[pl.Callback]:
        """`ReplicaProjection`, and `ReplicaCheckpoint` where the Trainer saves checkpoints; unless it has them."""
        wanted = self.trainer.checkpoint_callbacks and not self._replica_checkpoints()
        return self._with_projection([ReplicaCheckpoint()] if wanted else [])

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        for callback in self._replica_checkpoints():
            callback.save(self.trainer, self)

    def _replica_checkpoints(self) -> list[ReplicaCheckpoint]:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, ReplicaCheckpoint)]


def _factory(classifier: ClassifierFactory, data: dict[str, Any]) -> Callable[[int, float | None], ImageClassifier]:
    """Makes the replica of a seed and rate, and refuses it if it does more than `ReplicatedClassifier` does for it."""

    def make(seed: int, rate: float | None) -> ImageClassifier:
        if not callable(classifier) or isinstance(classifier, nn.Module):
            raise UsageError(
                f"classifier={type(classifier).__name__} object: give what makes one, e.g. "
                "functools.partial(DANNMLP, hidden_sizes=[100, 100])"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # not in the context of the command line, where it would take our hyperparameters for its own
            replica = contextvars.Context().run(classifier, **data)
        if not isinstance(replica, ImageClassifier):
            raise UsageError(f"classifier made a {type(replica).__name__}, which is no ImageClassifier")
        kind = type(replica)
        if next(replica.parameters(), None) is None:
            raise UsageError(f"{kind.__name__} has no parameters: set self.network in its __init__")
        own = [name for name in STEPS if getattr(kind, name, None) is not getattr(ImageClassifier, name, None)]
        if own:
            raise UsageError(
                f"{kind.__name__} has its own {', '.join(own)}, which replicas do not run: they train by forward and "
                "cross-entropy alone (callbacks belong to the Trainer)"
            )
        _own_hyperparameters(replica, data, rate)
        return replica

    return make


def _own_hyperparameters(replica: ImageClassifier, data: dict[str, Any], rate: float | None) -> None:
    """A class named on the command line is given the arguments of us all: keep those of the replica's single run."""
    given = replica.hparams.get("classifier")
    if "_class_path" not in replica.hparams or not isinstance(given, Mapping):
        return
    own = copy.deepcopy({**given.get("init_args", {}), **data})
    if rate is not None and isinstance(own.get("optimizer"), dict):
        own["optimizer"].setdefault("init_args", {})["lr"] = rate
    instantiator = replica.hparams["_instantiator"]
    replica.hparams.clear()
    replica.hparams.update({"_class_path": given["class_path"], **own, "_instantiator": instantiator})


class _Stack:
    """One parameter or buffer of all replicas in one tensor, of which theirs are slices.

    Tensors that have been given other memory since (by `torch.nn.Module.to`, a copy, a load) are stacked anew.
    """

    def __init__(self, owners: list[nn.Module], name: str) -> None:
        self.owners, self.name = owners, name
        self._addresses: list[int] = []

    def tensor(self) -> Tensor:
        """The stack. If it is trained, a leaf, whose gradient becomes the gradients of the slices."""
        slices: list[Tensor] = [getattr(owner, self.name) for owner in self.owners]
        if [s.data_ptr() for s in slices] != self._addresses:
            self._stack(slices)
        if not torch.is_grad_enabled() or not any(s.requires_grad for s in slices):
            return self.whole
        leaf = self.whole.detach().requires_grad_()

        def hand_down(leaf: Tensor) -> None:
            for s, gradient in zip(slices, leaf.grad.unbind(), strict=True):  # type: ignore[union-attr]
                s.grad = gradient if s.grad is None else s.grad + gradient

        leaf.register_post_accumulate_grad_hook(hand_down)
        return leaf

    @torch.inference_mode(False)  # in a first forward pass under it, the weights could never be trained again
    @torch.no_grad()
    def _stack(self, slices: list[Tensor]) -> None:
        self.whole = torch.stack([s.detach() for s in slices])
        if self.whole.dim() == 3:
            # transposed in memory, as the gradient of a batched matrix product is, which then need not be copied
            self.whole = self.whole.mT.contiguous().mT
        for s, view in zip(slices, self.whole, strict=True):
            s.data = view
        self._addresses = [view.data_ptr() for view in self.whole]


class _MeanOfEach(Metric):
    """Mean over samples of (N, R) values, for each of R replicas."""

    total: Tensor
    count: Tensor

    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(replicas), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        self.total += values.sum(0)
        self.count += len(values)

    def compute(self) -> Tensor:
        return self.total / self.count
