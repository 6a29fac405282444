"""A network that is compiled while it is trained."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_danns.errors import UsageError


class Compiled(pl.Callback):
    """Compiles the module's ``network`` in place (`torch.compile`) and keeps images channels-last, for the whole fit.

        python train.py fit --config configs/cifar10/dann_convnet.yaml --trainer.callbacks+=Compiled

    The first batch goes through uncompiled, so that negative inputs are refused. Compilation takes a minute or more,
    newly for each size of a batch; sizes that divide the number of images have one. Numbers are those of another order
    of operations, checkpoints the same as without. What looks into layers as they act sees nothing (`DaleDiagnostics`).
    torch compiles eight networks in a process, and trains the next uncompiled unless `torch.compiler.reset` was called.

    Args:
        backend: of `torch.compile`.

    Raises:
        UsageError: the module has no ``network``; a backend that torch does not know.
    """

    def __init__(self, backend: str | Callable = "inductor") -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if isinstance(backend, str) and backend not in known:
            raise UsageError(f"backend={backend!r}: torch.compile has {', '.join(map(str, known))}")
        self.backend, self._compiled = backend, False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        network = getattr(pl_module, "network", None)
        if not isinstance(network, nn.Module):
            raise UsageError(f"{type(pl_module).__name__} has no network: compile the module yourself, in place")
        if stage == "fit":
            network.to(memory_format=torch.channels_last)
            self._compiled = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._compiled:
            self._compiled = True
            pl_module.network.compile(backend=self.backend, dynamic=False)  # type: ignore[union-attr]
