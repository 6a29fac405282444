"""Weights keep their signs, and layers their balance, after every optimizer step of a Trainer."""

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_danns.callbacks.conflicts import refuse_frozen_by_finetuning, refuse_groups_without_factors
from lightning_danns.callbacks.steps import DecayToInhibition
from lightning_danns.errors import DivergedError, UsageError
from lightning_danns.layers import dale_layers, imbalances, project_, refuse_negative_inputs, sign_violations
from lightning_danns.optim import DECAY_TO_INHIBITION, require_factors

_START = (
    "weights that must be >= 0 are not: {}. Apply lightning_danns.project_(model), or start from weights that were "
    "trained under Dale's principle"
)
_TRAINED = (
    "weights that must be >= 0 are not: {}. If they are nan, training has diverged (lower the learning rate) or the "
    "data hold nan. If they are negative, something other than an optimizer wrote them: apply "
    "lightning_danns.project_(model) after it"
)


class DaleProjection(pl.Callback):
    """Clamps the weights that must be non-negative, then balances balanced layers, as the last act of every step.

    The modules of this package attach it themselves; give it to the Trainer for other modules. It hooks the optimizers
    of its Trainer and no other, each before its first step, so it acts under gradient accumulation, mixed precision
    and manual optimization, and other callbacks, checkpoints and validation only ever see projected weights. Averages
    of such weights (EMA) keep their signs; they are balanced before they are validated and when a fit ends.

    It refuses, when any stage starts, weights of the wrong sign or out of balance, and the first inputs of a layer from
    each loader if one is negative; before every step, learning rates that have lost their factors. A NaN has no sign:
    it ends the fit at the end of the epoch, and before a checkpoint is written. A little imbalance, and that of
    averages which the Trainer restores from a checkpoint, is mended instead.

    To project differently, subclass it and override `project`; the module then uses your instance.

    Raises:
        UsageError: see above; names weight, layer or group and the value.
        DivergedError: weights have become NaN.
    """

    def __init__(self) -> None:
        self._hooks: dict[Optimizer, list[RemovableHandle]] = {}
        self._averages = False
        self._end_input_check: Callable[[], None] = _nothing

    def project(self, pl_module: pl.LightningModule) -> None:
        """Bring the weights back to their signs and into balance; runs after each optimizer step."""
        project_(pl_module)

    def violations(self, pl_module: pl.LightningModule) -> dict[str, float]:
        """What ends a fit: the lowest value of each weight that is not >= 0, by name."""
        return sign_violations(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._averages = "current_model_state" in checkpoint  # beside which Lightning's WeightAveraging saves averages

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_start(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_start(pl_module)  # again: sharded strategies restore a checkpoint only after on_fit_start
        refuse_frozen_by_finetuning(pl_module, trainer.callbacks)  # type: ignore[attr-defined]
        for optimizer in trainer.optimizers:
            self._hook(optimizer, pl_module)
        self._check_inputs(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._hook(optimizer, pl_module)  # one that a callback has put in another's place

    def _hook(self, optimizer: Optimizer, pl_module: pl.LightningModule) -> None:
        if optimizer in self._hooks:
            return

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # catches whatever sets rates from outside: averaging, finetuning, the Tuner, own callbacks
            refuse_groups_without_factors(optimizer, pl_module)
            require_factors(optimizer, "something outside configure_optimizers (a callback or the Tuner)")

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.project(pl_module)

        _refuse_undecayed(optimizer, pl_module)
        before(optimizer, (), {})
        self._hooks[optimizer] = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._refuse_start(pl_module)
        elif imbalances(pl_module):  # averages, which an averaging callback has put in place
            self.project(pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_start(pl_module)

    on_predict_epoch_start = on_test_epoch_start

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:  # of each loader
            self._check_inputs(pl_module)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _check_inputs(self, pl_module: pl.LightningModule) -> None:
        self._end_input_check()
        self._end_input_check = refuse_negative_inputs(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _refuse(self.violations(pl_module), _TRAINED)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _refuse(self.violations(pl_module), _TRAINED)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if imbalances(pl_module):
            self.project(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        self._end_input_check()
        for handle in itertools.chain(*self._hooks.values()):
            handle.remove()
        self._hooks = {}
        self._averages = False

    def _refuse_start(self, pl_module: pl.LightningModule) -> None:
        _refuse(self.violations(pl_module), _START)
        lost = imbalances(pl_module)
        if not self._averages and any(worst > MENDED for worst in lost.values()):
            listing = ", ".join(f"{name} (up to {worst:.2g} of a unit's excitation)" for name, worst in lost.items())
            raise UsageError(
                f"these layers are balanced, but their weights are not: {listing}. If they were trained so, make them "
                "with balanced=False; if not, or if they are averages, apply lightning_danns.project_(model)"
            )
        if lost:
            self.project(pl_module)


MENDED = 0.03
"""Imbalance that is mended when a stage starts, because averages of balanced weights, and weights made in another
precision, may have it. The worst unit of a network that was never balanced is further off."""


def _refuse_undecayed(optimizer: Optimizer, module: pl.LightningModule) -> None:
    if any(DECAY_TO_INHIBITION in group for group in optimizer.param_groups):
        callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, DecayToInhibition) for callback in callbacks):
            raise UsageError(
                "groups of the optimizer decay to inhibition, but nothing carries that out: give the Trainer "
                "lightning_danns.DecayToInhibition (your own configure_callbacks must return those of super() too)"
            )


def _nothing() -> None: ...  # no lambda, because processes that are spawned get a copy


def _refuse(violations: dict[str, float], message: str) -> None:
    if violations:
        listing = [f"{name} (lowest value {low:.4g})" for name, low in violations.items()]
        kind = DivergedError if message is _TRAINED and any(map(math.isnan, violations.values())) else UsageError
        raise kind(message.format(", ".join([*listing[:3], *(["..."] if len(listing) > 3 else [])])))


def refuse_unprojected(module: pl.LightningModule, callbacks: Collection[pl.Callback]) -> None:
    """Refuse to train signed layers that nothing projects: ``configure_callbacks`` has left the projection out."""
    projected = any(isinstance(callback, DaleProjection) for callback in callbacks)
    if callbacks and not projected and any(dale_layers(module)):  # a search for a batch size has none, and undoes all
        raise UsageError(
            f"nothing would project the signed weights of {type(module).__name__}: its configure_callbacks must "
            "return those of super() too"
        )
