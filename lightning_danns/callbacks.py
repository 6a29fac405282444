"""Dale's principle during a Lightning fit: weights are projected before anyone can look."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_danns.errors import UsageError
from lightning_danns.layers import project_, refuse_negative_inputs, sign_violations
from lightning_danns.optim import clip_layers_, limit_clamping_, require_factors


class DaleProjection(pl.Callback):
    """Clamps the weights that must be non-negative as the last act of every optimizer step.

    The modules of this package attach it themselves; give it to the Trainer for other modules. It hooks into the
    optimizers, so it acts once per step under gradient accumulation, mixed precision and manual optimization, and
    other callbacks, checkpoints and validation only ever see weights of the right sign. When a fit starts, it
    refuses starting weights of the wrong sign, and the first inputs of each layer if they are negative; before every
    step, it refuses learning rates from which something has removed the factors.

    An optimizer of your own that `configure_optimizers` does not return is out of its sight: call `project_`.

    To project differently, subclass it and override `project`; the module then uses your instance.

    Raises:
        UsageError: at the start of a fit, for negative weights or inputs; before a step, for lost factors.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._end_input_check: Callable[[], None] = lambda: None

    def project(self, pl_module: pl.LightningModule) -> None:
        """Bring the weights back to their signs; runs after each optimizer step."""
        project_(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._refuse_violations(pl_module)
        self._end_input_check = refuse_negative_inputs(pl_module)

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.project(pl_module)

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            # catches whatever sets rates from outside: StochasticWeightAveraging, finetuning, the Tuner, own callbacks
            require_factors(optimizer, "something outside configure_optimizers (a callback or the Tuner)")

        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(before_step))
            self._handles.append(optimizer.register_step_post_hook(after_step))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # again: sharded strategies restore a checkpoint only after on_fit_start
        self._refuse_violations(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        self._end_input_check()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @staticmethod
    def _refuse_violations(pl_module: pl.LightningModule) -> None:
        violations = sign_violations(pl_module)
        if violations:
            listing = ", ".join(f"{name} (lowest value {low:.4g})" for name, low in violations.items())
            raise UsageError(
                f"the starting weights break Dale's principle: {listing}. Apply lightning_danns.project_(model), "
                "or start from weights that were trained under it"
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
        if not 0 <= epsilon <= 1 or halvings < 0:
            raise UsageError(f"epsilon={epsilon}, halvings={halvings}: epsilon from 0 to 1, halvings at least 0")
        self.epsilon, self.halvings = epsilon, halvings

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        limit_clamping_(pl_module, optimizer, self.epsilon, self.halvings)


class ReplicaCheckpoint(pl.callbacks.Checkpoint):
    """Saves every replica of a `ReplicatedClassifier` as an ordinary checkpoint, and the metrics of all as one table.

    `ReplicatedClassifier` attaches it where the Trainer saves checkpoints. It writes into the folder of the log

        replicas.csv                        a row for each replica and epoch: its seed, learning rate and metrics
        replicas/3/checkpoints/best.ckpt    replica 3 at its highest validation accuracy
        replicas/3/checkpoints/last.ckpt    replica 3 after the last epoch
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._best: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows, self._best = list(state_dict["rows"]), dict(state_dict["best"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(str(trainer.log_dir))
        for row in pl_module.table(trainer.callback_metrics):
            index, accuracy = row["replica"], row.get("val_accuracy", float("-inf"))
            self._rows.append({"epoch": trainer.current_epoch, **row})
            checkpoints = folder / "replicas" / str(index) / "checkpoints"
            pl_module.save_replica(index, checkpoints / "last.ckpt")
            if accuracy > self._best.get(index, float("-inf")):
                self._best[index] = accuracy
                pl_module.save_replica(index, checkpoints / "best.ckpt")
        self._write(self._rows, folder)

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._write(pl_module.table(trainer.callback_metrics), Path(str(trainer.log_dir)))

    @staticmethod
    def _write(rows: list[dict[str, Any]], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "replicas.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
