"""What the Fisher information of a network in training is, and what the published factors take it to be."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info

from lightning_danns.errors import UsageError
from lightning_danns.layers import dale_layers
from lightning_danns.optim import change_factors_, fisher_ratios, measured_factors


class FisherMonitor(pl.Callback):
    """Measures the diagonal Fisher information of each kind of parameter, relative to Wex (see `fisher_ratios`).

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

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        epoch = trainer.current_epoch
        if batch_idx > 0 or (epoch > 0 and (self.every_n_epochs is None or epoch % self.every_n_epochs)):
            return
        network = getattr(pl_module, "network", None)
        if not isinstance(network, torch.nn.Module):
            raise UsageError(f"FisherMonitor measures pl_module.network, which {type(pl_module).__name__} has not")
        images = batch[0]
        generator = torch.Generator(images.device).manual_seed(epoch)  # not torch's, which training draws from
        measured = fisher_ratios(network, images, generator)
        names = [(layer, kind) for layer, kinds in measured.items() for kind in kinds]
        local = torch.tensor([measured[layer][kind] for layer, kind in names], device=images.device)
        values: Any = trainer.strategy.reduce(local, reduce_op="mean")  # over all processes
        ratios: dict[str, dict[str, float]] = {}
        for (layer, kind), value in zip(names, values.tolist(), strict=True):
            ratios.setdefault(layer, {})[kind] = value
        if epoch == 0:
            rank_zero_info(_table(network, ratios))
        logged = {f"network.{layer}/fisher_{kind}": ratios[layer][kind] for layer, kind in names}
        for logger in trainer.loggers:
            logger.log_metrics({**logged, "epoch": epoch}, trainer.global_step)
        if getattr(pl_module, "correction", None) == "measured":
            factors = {f"network.{name}": factor for name, factor in measured_factors(network, ratios).items()}
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer in trainer.optimizers:
                change_factors_(optimizer, factors, schedulers)


def _table(network: torch.nn.Module, ratios: dict[str, dict[str, float]]) -> str:
    lines = ["Fisher information relative to the layer's first parameter: measured (assumed by the published factors)"]
    for name, layer in dale_layers(network):
        assumed = {kind: 1 / factor for kind, factor in layer.lr_factors().items()}
        cells = [
            f"{kind} {ratio:.2g}" + (f" ({assumed[kind]:.2g})" if kind in assumed else "")
            for kind, ratio in ratios.get(name, {}).items()
        ]
        lines.append(f"  network.{name}: " + ", ".join(cells))
    return "\n".join(lines)
