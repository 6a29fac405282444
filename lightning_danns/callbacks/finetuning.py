"""Training that starts from another network's weights: which it takes, and which of them rest."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_danns.errors import UsageError


def load_body_(module: nn.Module, path: str | Path, leave: Sequence[str] = ()) -> list[str]:
    """Fill the layers of ``module`` with the weights of a checkpoint, each layer that fits as a whole.

    A layer fits if the checkpoint has all its parameters and buffers under its name and in their shapes. A head for
    another number of classes does not, and stays as it is: all of it, because inhibition only balances the excitation
    it was made or trained with.

    Args:
        module: to be filled in place, a `DaleLightningModule` for example.
        path: of a Lightning checkpoint, or of a state dict that torch saved.
        leave: names of modules to leave as they are, whether they fit or not.

    Returns:
        The names of the layers that were left.

    Raises:
        UsageError: the file does not exist or cannot be read, nothing in it fits, or a name in ``leave`` is no module.

    Example:
        >>> from lightning_danns import DANNMLP
        >>> digits, letters = DANNMLP(hidden_sizes=[20], num_classes=10), DANNMLP(hidden_sizes=[20], num_classes=26)
        >>> torch.save(digits.state_dict(), path := getfixture("tmp_path") / "digits.pt")
        >>> load_body_(letters, path)
        ['network.3']
    """
    saved = _weights(path)
    modules = dict(module.named_modules())
    for name in leave:
        if name not in modules:
            raise UsageError(f"leave names {name!r}, which is no module of {type(module).__name__}")
    left = []
    state = module.state_dict(keep_vars=True)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        layer, parametrized, _ = name.partition(".parametrizations.")
        layers.setdefault(layer if parametrized else name.rpartition(".")[0], {})[name] = value
    with torch.no_grad():
        for layer, own in layers.items():
            fits = all(name in saved and saved[name].shape == value.shape for name, value in own.items())
            if not fits or any(layer == name or layer.startswith(name + ".") for name in leave):
                left.append(layer)
            else:
                for name, value in own.items():
                    value.copy_(saved[name])
    if len(left) == len(layers):
        raise UsageError(
            f"no layer of this {type(module).__name__} is in {path}: of {', '.join(list(state)[:3])}, ... none has the "
            f"same name and shape there, where are {', '.join(list(saved)[:3])}, ..."
        )
    return left


def _weights(path: str | Path) -> dict[str, Tensor]:
    if not os.path.exists(path := os.path.expanduser(path)):
        raise UsageError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {k: v for k, v in content.get("state_dict", content).items() if isinstance(v, Tensor)}
    except Exception as error:
        raise UsageError(f"checkpoint {path} cannot be read ({type(error).__name__}): it holds no weights") from error


class StartFrom(pl.Callback):
    """Starts a fit from the weights of another run, as far as they fit (`load_body_`); prints which layers are new.

    A fit that goes on from a checkpoint of its own takes that one's weights, and does not need ``path`` any more.

    Args:
        path, leave: see `load_body_`.
    """

    def __init__(self, path: str, leave: Sequence[str] = ()) -> None:
        self.path, self.leave = str(path), list(leave)
        self._left: list[str] = []
        self._error: UsageError | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":  # before weights are sharded, and before a checkpoint is restored
            try:
                self._left, self._error = load_body_(pl_module, self.path, self.leave), None
            except UsageError as error:
                self._error = error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path:  # known only now
            return
        if self._error is not None:
            raise self._error
        rank_zero_info(f"weights of {self.path}; new are: {', '.join(self._left) or 'none'}")


class Unfreeze(pl.Callback):
    """Keeps parts of a module as they are until an epoch, and trains them from then on with the factors of their group.

    The parts stay in the optimizer's groups, so schedules and factors hold for them as for all; resuming is exact,
    because what is frozen follows from the epoch alone. Running statistics of normalisation layers rest too.

    Args:
        names: of modules or parameters (``["network.0", "network.3.Wex"]``).
        epoch: the first epoch that trains them; None never does.
        but: modules or parameters within them that train from the start, a new head for example.
    """

    def __init__(self, names: Sequence[str], epoch: int | None = None, but: Sequence[str] = ()) -> None:
        self.names, self.epoch, self.but = list(names), epoch, list(but)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = self.epoch is not None and trainer.current_epoch >= self.epoch
        known: dict[str, Any] = {**dict(pl_module.named_parameters()), **dict(pl_module.named_modules())}
        for name in (*self.names, *self.but):
            if not name or name not in known:
                raise UsageError(f"{name!r} is no module or parameter of {type(pl_module).__name__}")
        for name, train in (*((name, trained) for name in self.names), *((name, True) for name in self.but)):
            known[name].requires_grad_(train)
            if isinstance(known[name], nn.Module):
                known[name].train(train)

    on_train_epoch_start = on_validation_end = on_train_start  # validation has put all modules back into training mode

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for name in self.names:  # the next fit makes groups of what can be trained
            dict([*pl_module.named_parameters(), *pl_module.named_modules()])[name].requires_grad_(True)
