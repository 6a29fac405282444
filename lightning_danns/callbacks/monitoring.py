"""Watching Dale's networks learn: what inhibition does in each layer, and how much its parameters matter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_danns.analysis.diagnostics import (
    LayerActivity,
    inspectable_layers,
    projection_cosine,
    weight_diagnostics,
)
from lightning_danns.errors import UsageError
from lightning_danns.layers import DaleModule, dale_layers, unobservable
from lightning_danns.optim import Likelihood, categorical, change_factors_, fisher_ratios, measured, measured_factors


class DaleDiagnostics(pl.Callback):
    """Logs what inhibition does in every layer, as ``LAYER/QUANTITY`` (``network.1/ei_ratio``), a row an epoch.

    The quantities are defined in `lightning_danns.analysis.diagnostics`. One batch in ``every_n_batches`` is looked at,
    from the first on: what its layers compute in the forward pass of training, and the step that follows, of the
    Trainer's optimizers, for ``projection_cosine``. The row has means over the epoch's batches, as ``train_loss`` is,
    and the weights of its end.
    Training is not disturbed: weights end as without it, to the bit.

    On a CPU core (784-500-500-500-10, batch 32), a batch that is looked at takes the time of 1.6 more steps, and the
    end of an epoch that of 11 (singular values, by the cube of the layers' width): 2 % of an epoch of MNIST.

    A layer that is not called, not stepped (frozen) or compiled (torch.compile leaves nothing to look at) has the
    remaining quantities alone. With several processes, activities are those of the batches of the first.

    Args:
        every_n_epochs: log after every so many epochs.
        every_n_batches: look at one in so many batches of such an epoch.

    Attributes:
        latest: the values of the newest row.

    Raises:
        UsageError: a number below 1.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_batches: int = 100) -> None:
        if min(every_n_epochs, every_n_batches) < 1:
            raise UsageError(
                f"every_n_epochs={every_n_epochs}, every_n_batches={every_n_batches}: both must be at least 1"
            )
        self.every_n_epochs, self.every_n_batches = every_n_epochs, every_n_batches
        self.latest: dict[str, float] = {}
        self._forget()
        self._handles: list[RemovableHandle] = []
        self._steps = _Steps([])

    def _forget(self) -> None:
        self._activity: dict[str, LayerActivity] = {}
        self._cosines: dict[str, list[float]] = {}

    def _due(self, trainer: pl.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = _Steps(trainer.optimizers)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._due(trainer) or batch_idx % self.every_n_batches:
            return
        names = {layer: name for name, layer in inspectable_layers(pl_module)}

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # before the layer acts, when sharded strategies have its weights whole; not in a compiled graph, nor in
            # what torch.func does with the batch besides
            if unobservable() or layer not in names:
                return
            x = next(iter((*args, *kwargs.values())), None)
            if isinstance(x, Tensor):
                self._activity.setdefault(names[layer], LayerActivity()).update(layer, x)

        self._handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in names]
        self._steps.watch({name: layer for layer, name in names.items() if isinstance(layer, DaleModule)})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._look_away()
        # gradients may be accumulated over more batches, until the step comes
        for name, cosine in self._steps.taken():
            self._cosines.setdefault(name, []).append(cosine)

    def _look_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # before the epoch's checkpoints; every process takes part, because sharded weights are put together here
        self._steps.forget()
        if not self._due(trainer):
            return
        values: dict[str, float] = {}
        for name, layer in inspectable_layers(pl_module):
            of_layer = self._activity.get(name, LayerActivity()).compute() | weight_diagnostics(layer)
            if name in self._cosines:
                of_layer["projection_cosine"] = math.fsum(self._cosines[name]) / len(self._cosines[name])
            values |= {f"{name}/{quantity}": value for quantity, value in of_layer.items()}
        self._forget()
        self.latest = values
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step - 1)
            logger.save()

    def state_dict(self) -> dict[str, Any]:
        """What has been seen of an epoch, so that a fit that goes on within it logs the whole."""
        return {
            "activity": {name: activity.sums for name, activity in self._activity.items()},
            "cosines": self._cosines,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._activity = {name: LayerActivity(sums) for name, sums in state_dict["activity"].items()}
        self._cosines = {name: list(cosines) for name, cosines in state_dict["cosines"].items()}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._look_away()
        self._steps.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._look_away()
        self._steps.end()


class _Steps:
    """Watches steps of some optimizers: signed weights before one, after it, and after their projection.

    Its hooks are the first of each optimizer, since on_fit_start; the projection comes later in the step.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.forget()
        self._handles = [optimizer.register_step_pre_hook(self._before) for optimizer in optimizers]
        self._handles += [optimizer.register_step_post_hook(self._after) for optimizer in optimizers]

    def forget(self) -> None:
        self._layers: Mapping[str, DaleModule] = {}  # those watched; none: steps pass by
        self._cosines: list[tuple[str, float]] = []
        self._stepped: dict[str, tuple[list[nn.Parameter], list[Tensor], list[Tensor]]] = {}
        self._any = False

    def watch(self, layers: Mapping[str, DaleModule]) -> None:
        """Look at the next steps, until one was `taken`."""
        self._layers = layers

    def taken(self) -> list[tuple[str, float]]:
        """Layers and cosines of the steps since `watch`, after which it looks no more; empty if none has come."""
        self._compare()
        cosines = self._cosines
        if self._any:
            self.forget()
        return cosines

    def end(self) -> None:
        self.forget()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._compare()
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in self._layers.items():
            own = [parameter for _, parameter in layer.nonnegative_parameters() if parameter in trained]
            if own:
                self._stepped[name] = own, _copies(own), []

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._any = True
        for own, _, stepped in self._stepped.values():
            stepped += _copies(own)

    def _compare(self) -> None:
        """Of the last step, if there was one: its weights have been projected by now."""
        for name, (own, start, stepped) in self._stepped.items():
            if stepped:
                cosine = projection_cosine(start, stepped, [parameter.detach() for parameter in own])
                if not math.isnan(cosine):  # a layer that was not stepped
                    self._cosines.append((name, cosine))
        self._stepped = {}


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


class FisherMonitor(pl.Callback):
    """Measures the diagonal Fisher information of each kind of parameter, relative to Wex (see `fisher_ratios`).

    What the network predicts is the softmax of its outputs, unless the module has a method ``likelihood(outputs)`` that
    returns another `torch.distributions.Distribution`. A batch is a tensor of inputs, or begins with it.

    It does so on the first batch of a fit, before its step, and prints the ratios beside those that the published
    factors assume. Under ``correction="measured"`` they become the learning-rate factors (see `measured_factors`); the
    module then attaches this callback by itself. The loggers get them as ``LAYER/fisher_KIND``.

    Args:
        every_n_epochs: measure again on the first batch of every so many epochs, and under ``correction="measured"``
            go on with the new factors. Not given: only once.

    Raises:
        UsageError: the module has no ``network``, or one whose samples have no gradients of their own (batch norm).
    """

    def __init__(self, every_n_epochs: int | None = None) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise UsageError(f"every_n_epochs={every_n_epochs}: it must be at least 1, or null to measure only once")
        self.every_n_epochs = every_n_epochs
        self._measured = False

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._measured = state_dict["measured"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._measured = False  # each fit has groups of its own; one that goes on restores what its checkpoint knew

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        epoch = trainer.current_epoch
        again = batch_idx == 0 and self.every_n_epochs is not None and epoch % self.every_n_epochs == 0
        if self._measured and not again:
            return
        self._measured = True
        network = getattr(pl_module, "network", None)
        if not isinstance(network, torch.nn.Module):
            raise UsageError(f"FisherMonitor measures pl_module.network, which {type(pl_module).__name__} has not")
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        generator = torch.Generator(inputs.device).manual_seed(epoch)  # not torch's, which training draws from
        likelihood: Likelihood = getattr(pl_module, "likelihood", categorical)
        found = fisher_ratios(network, inputs, generator, likelihood)
        names = [(layer, kind) for layer, kinds in found.items() for kind in kinds]
        local = torch.tensor([found[layer][kind] for layer, kind in names], device=inputs.device)
        values: Any = trainer.strategy.reduce(local, reduce_op="mean")  # over all processes
        ratios: dict[str, dict[str, float]] = {}
        for (layer, kind), value in zip(names, values.tolist(), strict=True):
            ratios.setdefault(layer, {})[kind] = value
        if epoch == 0:
            rank_zero_info(_table(network, ratios))
        logged = {f"network.{layer}/fisher_{kind}": ratios[layer][kind] for layer, kind in names}
        for logger in trainer.loggers:
            logger.log_metrics({**logged, "epoch": epoch}, trainer.global_step)
        if getattr(pl_module, "correction", None) is measured:
            factors = {f"network.{name}": factor for name, factor in measured_factors(network, ratios).items()}
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer in trainer.optimizers:
                change_factors_(optimizer, factors, schedulers)


def _table(network: torch.nn.Module, ratios: dict[str, dict[str, float]]) -> str:
    lines = ["Fisher information relative to that of Wex: measured (assumed by the published factors)"]
    for name, layer in dale_layers(network):
        assumed = {kind: 1 / factor for kind, factor in layer.lr_factors().items()}
        cells = [
            f"{kind} {ratio:.2g}" + (f" ({assumed[kind]:.2g})" if kind in assumed else "")
            for kind, ratio in ratios.get(name, {}).items()
        ]
        lines.append(f"  network.{name}: " + ", ".join(cells))
    return "\n".join(lines)
