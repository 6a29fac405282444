"""Dale's principle during a Lightning fit: weights are projected before anyone can look."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_danns.errors import DivergedError, UsageError
from lightning_danns.layers import project_, refuse_negative_inputs, sign_violations
from lightning_danns.optim import check_cosine_rule, clip_layers_, limit_clamping_, require_factors

_START = (
    "the starting weights break Dale's principle: {}. Apply lightning_danns.project_(model), or start from weights "
    "that were trained under it"
)
_TRAINED = (
    "weights that must be >= 0 are not: {}. If they are nan, training has diverged (lower the learning rate) or the "
    "data hold nan. If they are negative, something other than an optimizer wrote them: apply "
    "lightning_danns.project_(model) after it"
)


class DaleProjection(pl.Callback):
    """Clamps the weights that must be non-negative as the last act of every optimizer step.

    The modules of this package attach it themselves; give it to the Trainer for other modules. During a fit it acts
    after every step of every optimizer, also under gradient accumulation, mixed precision and manual optimization, so
    other callbacks, checkpoints and validation only ever see weights of the right sign. When a fit starts, it
    refuses starting weights of the wrong sign, and the first inputs of each layer if they are negative; before every
    step, it refuses learning rates from which something has removed the factors. A NaN has no sign: it ends the fit
    at the end of the epoch, and before a checkpoint is written.

    To project differently, subclass it and override `project`; the module then uses your instance.

    Raises:
        UsageError: at the start of a fit, for negative weights or inputs; before a step, for lost factors; after an
            epoch and before a checkpoint, for weights that are NaN or were made negative from outside.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._end_input_check: Callable[[], None] = lambda: None

    def project(self, pl_module: pl.LightningModule) -> None:
        """Bring the weights back to their signs; runs after each optimizer step."""
        project_(pl_module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._remove_hooks()

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            # catches whatever sets rates from outside: StochasticWeightAveraging, finetuning, the Tuner, own callbacks
            try:
                require_factors(optimizer, "something outside configure_optimizers (a callback or the Tuner)")
            except UsageError:
                self._remove_hooks()  # here too, because the Tuner swaps callbacks out and on_exception is not called
                raise

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.project(pl_module)

        # of all optimizers: a callback may replace those of the Trainer, manual optimization may have others
        self._handles = [register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_violations(pl_module, trained=False)
        self._end_input_check = refuse_negative_inputs(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # again: sharded strategies restore a checkpoint only after on_fit_start
        self._refuse_violations(pl_module, trained=False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_violations(pl_module, trained=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._refuse_violations(pl_module, trained=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._end_input_check()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def violations(self, pl_module: pl.LightningModule) -> dict[str, float]:
        """What ends a fit: the lowest value of each weight that is not >= 0, by name."""
        return sign_violations(pl_module)

    def _refuse_violations(self, pl_module: pl.LightningModule, trained: bool) -> None:
        violations = self.violations(pl_module)
        if violations:
            listing = [f"{name} (lowest value {low:.4g})" for name, low in violations.items()]
            kind = DivergedError if trained and any(map(math.isnan, violations.values())) else UsageError
            raise kind(
                (_TRAINED if trained else _START).format(
                    ", ".join([*listing[:3], *(["..."] if len(listing) > 3 else [])])
                )
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
    """Shortens each signed layer's step until clamping turns it by a cosine of at least 1 - ``epsilon``.

    See `limit_clamping_`; for plain SGD. List it after `LayerGradientClipping`, whose result it must see.
    """

    def __init__(self, epsilon: float, halvings: int = 10) -> None:
        check_cosine_rule(epsilon, halvings)
        self.epsilon, self.halvings = epsilon, halvings

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        limit_clamping_(pl_module, optimizer, self.epsilon, self.halvings)


class ReplicaProjection(DaleProjection):
    """Projects the replicas of a `ReplicatedClassifier`, and lets them go on when some have diverged, but not all."""

    def violations(self, pl_module: Any) -> dict[str, float]:
        violations = sign_violations(pl_module)
        diverged = {name.split(".")[1] for name, lowest in violations.items() if math.isnan(lowest)}  # replicas.K.layer
        if len(diverged) == len(pl_module.replicas):
            return violations
        return {name: lowest for name, lowest in violations.items() if name.split(".")[1] not in diverged}


class ReplicaCheckpoint(pl.Callback):
    """Saves every replica of a `ReplicatedClassifier` as an ordinary checkpoint, and the metrics of all as one table.

    `ReplicatedClassifier` attaches it where the Trainer saves checkpoints. It writes into the folder of the log

        replicas.csv                        a row for each replica and epoch: its seed, learning rate and metrics
        replicas_test.csv                   after a test, a row for each replica
        replicas/3/checkpoints/best.ckpt    replica 3 at its highest validation accuracy
        replicas/3/checkpoints/last.ckpt    replica 3 after the last epoch, or before it diverged
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._best: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows, self._best = list(state_dict["rows"]), dict(state_dict["best"])

    def save(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write what an epoch has brought; the module asks for it when the epoch's metrics are known.

        No hook of a callback is late enough for the metrics and early enough for ``last.ckpt`` to hold their rows.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(str(trainer.log_dir))
        for row in pl_module.table(trainer.callback_metrics):
            index, accuracy = row["replica"], row.get("val_accuracy", float("-inf"))
            self._rows.append({"epoch": trainer.current_epoch, **row})
            if sign_violations(pl_module.replicas[index]):
                continue  # it has diverged: keep what it was before
            checkpoints = folder / "replicas" / str(index) / "checkpoints"
            pl_module.save_replica(index, checkpoints / "last.ckpt")
            if accuracy > self._best.get(index, float("-inf")):
                self._best[index] = accuracy
                pl_module.save_replica(index, checkpoints / "best.ckpt")
        self._write(self._rows, folder / "replicas.csv")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        table = pl_module.table(trainer.callback_metrics)
        self._write(table, Path(str(trainer.log_dir)) / "replicas_test.csv")

    @staticmethod
    def _write(rows: list[dict[str, Any]], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
