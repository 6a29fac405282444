"""Arguments of a module as plain values, and back: what a checkpoint and a logger can hold, and anyone can read.

    functools.partial(torch.optim.SGD, lr=0.1)  <->  {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}

Classes and functions are named by the path that imports them; numbers and arrays of NumPy, ranges and paths become
numbers, lists and strings. What has no such form (a lambda, an object) is kept as ``{"not_saved": its repr}``.
"""

import functools
import inspect
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from pathlib import PurePath
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser, Namespace
from pytorch_lightning.utilities import rank_zero_warn

from lightning_danns.errors import UsageError

NOT_SAVED = "not_saved"


@functools.cache
def _accepted(cls: type) -> set[str] | None:
    """Arguments of ``cls`` and those that its ``**kwargs`` pass on; None, for any, if its source does not tell them."""
    parameters = inspect.signature(cls).parameters
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "of", fail_untyped=False)  # it follows super().__init__(**kwargs)
    known = set(vars(parser.get_defaults().get("of") or Namespace()))
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if open_ended and known <= set(parameters) else known | set(parameters)


def keep_plain(module: pl.LightningModule) -> None:
    """Turn the arguments that a module has saved (``hparams``) into plain values."""
    kind: type = type(module)
    accepted = _accepted(kind)
    for name, value in list(module.hparams.items()):
        if accepted is None or name in accepted:
            module.hparams[name] = plain(value)
        else:  # a subclass passes it on by itself, and could not be made with it
            del module.hparams[name]


def plain(value: Any) -> Any:
    """``value`` made of None, bool, int, float, str, list and dict alone."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):  # first: a float64 is a float too
        return value.tolist()
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(item) for item in value]
    made: Any = direct(value)
    init_args: dict[str, Any] = {}
    if isinstance(made, functools.partial):
        if made.args or any(isinstance(argument, torch.Tensor) for argument in made.keywords.values()):
            return {NOT_SAVED: repr(value)}
        made, init_args = made.func, plain(made.keywords)
    path = f"{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', '')}"
    try:
        importable = imported(path) is made
    except UsageError:
        importable = False
    if not importable:
        return {NOT_SAVED: repr(value)}
    return {"class_path": path, **({"init_args": init_args} if init_args else {})}


def direct(factory: Any) -> Any:
    """The partial of a class itself, of jsonargparse's partial that has it among its arguments; else ``factory``."""
    if isinstance(factory, functools.partial) and factory.func.__module__.startswith("jsonargparse"):
        for part in factory.args:
            if isinstance(part, type):
                return functools.partial(part, **factory.keywords)
    return factory


def restored(value: Any) -> Any:
    """What `plain` made a ``class_path`` of, with its arguments bound; any other value as it is."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if not isinstance(value, Mapping) or "class_path" not in value:
        return value
    made = imported(value["class_path"])
    init_args = {name: restored(item) for name, item in value.get("init_args", {}).items()}
    return functools.partial(made, **init_args) if init_args else made


def imported(path: str) -> Any:
    """The class or function of that import path; a `UsageError` if there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{path!r} cannot be imported: give the path of a class or function ({error})") from error


def made_of(factory: Any, name: str, example: str) -> Any:
    """The factory that an argument is, or was before it was kept in a checkpoint."""
    if was_lost(factory, name):
        return lambda *args, **kwargs: _lost(name)
    factory = direct(restored(factory))
    if not callable(factory):
        raise UsageError(f"{name}={factory!r}: give a function such as {example}")
    return factory


def function_of(value: Any, name: str, example: str) -> Any:
    """An argument that may be a function: what its import path or its kept form stands for; any other as it is."""
    if isinstance(value, str) and "." in value:
        return imported(value)
    if isinstance(value, Mapping) and (NOT_SAVED in value or "class_path" in value):
        return made_of(value, name, example)
    return value


def was_lost(value: Any, name: str) -> bool:
    """Whether a checkpoint could not keep an argument; says so."""
    lost = isinstance(value, Mapping) and NOT_SAVED in value
    if lost:
        rank_zero_warn(f"the checkpoint could not keep {name}={value[NOT_SAVED]}: give it again, to train on")
    return lost


def _lost(name: str) -> None:
    raise UsageError(f"the checkpoint could not keep {name}: load it with load_from_checkpoint(path, {name}=...)")
