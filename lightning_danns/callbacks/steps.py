"""Rules on gradients just before an optimizer's step: bounds on one layer's step, and decay to inhibition."""

from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from lightning_danns.callbacks.conflicts import refuse_twice
from lightning_danns.errors import UsageError
from lightning_danns.optim import (
    DECAY_TO_INHIBITION,
    check_cosine_rule,
    clip_layers_,
    decay_to_inhibition_,
    limit_clamping_,
)


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


class DecayToInhibition(pl.Callback):
    """Weight decay that leads excitatory weights to the inhibition that they meet (see `decay_to_inhibition_`).

    A `DaleLightningModule` with ``decay_to="inhibition"`` attaches it itself. Under manual optimization it acts on the
    steps of ``self.optimizers()``, as all such callbacks do.

    Raises:
        UsageError: no group of the optimizers decays to inhibition; the Trainer clips gradients, the decay with them;
            there are two of this callback; or gradients are scaled when it acts (a fused optimizer in float16).
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_twice(trainer, self)
        if trainer.gradient_clip_val:
            raise UsageError(
                f"decay_to='inhibition' with gradient_clip_val={trainer.gradient_clip_val}, which would clip the decay "
                "too: use LayerGradientClipping"
            )
        if not any(
            DECAY_TO_INHIBITION in group for optimizer in trainer.optimizers for group in optimizer.param_groups
        ):
            raise UsageError(
                "DecayToInhibition has nothing to do: no group of the optimizers decays to inhibition. Give the module "
                "decay_to='inhibition', or fisher_param_groups where you make groups of your own"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.precision == "16-mixed" and any(group.get("fused") for group in optimizer.param_groups):
            raise UsageError(
                "decay_to='inhibition' with a fused optimizer in 16-mixed, which is given scaled gradients: use "
                "fused=False, or bf16-mixed"
            )
        decay_to_inhibition_(pl_module, optimizer)
