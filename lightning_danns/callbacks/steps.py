"""Rules that keep one layer's step within bounds, and layers that rest until an epoch."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_danns.errors import UsageError
from lightning_danns.optim import check_cosine_rule, clip_layers_, limit_clamping_


class _StepControl(pl.Callback):
    """A rule on gradients just before the optimizer's step, once they are unscaled and accumulated."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.gradient_clip_val:
            raise UsageError(
                f"{type(self).__name__} and gradient_clip_val={trainer.gradient_clip_val} both change the gradients, "
                "and the Trainer's clipping knows no learning-rate factors: use one of them"
            )


class LayerGradientClipping(_StepControl):
    """Clips each layer's gradient, after its learning-rate factors, to a norm of ``max_norm`` (see `clip_layers_`).

    The Trainer's ``gradient_clip_val`` clips the raw gradient of the whole model instead; use one of the two.
    """

    def __init__(self, max_norm: float) -> None:
        if not max_norm > 0:
            raise UsageError(f"max_norm={max_norm}: it must be positive")
        self.max_norm = max_norm

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        clip_layers_(pl_module, optimizer, self.max_norm)


class CosineStepControl(_StepControl):
    """Shortens each signed layer's step until clamping turns its parameters by a cosine of at least 1 - ``epsilon``.

    The cosine is that between the layer's parameters after a step, before and after they are clamped: of |t'| and
    |max(t', 0)|, not of the steps themselves (`limit_clamping_`). Parameters are much longer than a step, so an
    ``epsilon`` that acts is small, 1e-5 or so. For plain SGD. List it after `LayerGradientClipping`.
    Logs ``shortened_steps``, the share of layers' steps of the epoch that it has shortened.
    """

    def __init__(self, epsilon: float, halvings: int = 10) -> None:
        check_cosine_rule(epsilon, halvings)
        self.epsilon, self.halvings = epsilon, halvings
        self._steps = self._shortened = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        fractions = limit_clamping_(pl_module, optimizer, self.epsilon, self.halvings)
        self._steps += len(fractions)
        self._shortened += sum(fraction < 1 for fraction in fractions.values())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("shortened_steps", self._shortened / max(self._steps, 1))
        self._steps = self._shortened = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "shortened": self._shortened}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._shortened = state_dict["steps"], state_dict["shortened"]


class Unfreeze(pl.Callback):
    """Keeps parts of a module as they are until an epoch, and trains them from then on with the factors of their group.

    The parts stay in the optimizer's groups, so schedules and factors hold for them as for all; resuming is exact,
    because what is frozen follows from the epoch alone. Running statistics of normalisation layers rest too.

    Args:
        names: of modules or parameters (``["network.0", "network.3.Wex"]``).
        epoch: the first epoch that trains them; None never does.
    """

    def __init__(self, names: Sequence[str], epoch: int | None = None) -> None:
        self.names, self.epoch = list(names), epoch

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply(trainer, pl_module)  # validation has put every module back into training mode

    def _apply(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = self.epoch is not None and trainer.current_epoch >= self.epoch
        for part in self._parts(pl_module):
            if isinstance(part, nn.Module):
                part.requires_grad_(trained)
                part.train(trained)
            else:
                part.requires_grad_(trained)

    def _parts(self, pl_module: pl.LightningModule) -> list[nn.Module | torch.Tensor]:
        known: dict[str, Any] = {**dict(pl_module.named_parameters()), **dict(pl_module.named_modules())}
        for name in self.names:
            if not name or name not in known:
                raise UsageError(f"{name!r} is no module or parameter of {type(pl_module).__name__}")
        return [known[name] for name in self.names]
