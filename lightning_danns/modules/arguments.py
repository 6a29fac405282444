"""Arguments of a module as plain values, and back: what a checkpoint and a logger can hold, and anyone can read.

    functools.partial(torch.optim.SGD, lr=0.1)  <->  {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}

Classes and functions are named by the path that imports them; numbers and arrays of NumPy, ranges and paths become
numbers, lists and strings. What has no such form (a lambda, an object) is kept as ``{"not_saved": its repr}``.
"""

import functools
import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from lightning_danns.errors import UsageError

NOT_SAVED = "not_saved"


def given(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``cls(*args, **kwargs)`` by name; none if they do not fit, which calling ``cls`` will say."""
    try:
        bound = inspect.signature(cls).bind(*args, **kwargs)
    except TypeError:
        return {}
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        else:
            arguments[name] = value
    return arguments


def plain(value: Any) -> Any:
    """``value`` made of None, bool, int, float, str, list and dict alone."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):  # first: a float64 is a float too
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(item) for item in value]
    made, init_args = value, {}
    if isinstance(value, functools.partial):  # a parser's has the class among its arguments
        made = next((part for part in (value.func, *value.args) if isinstance(part, type)), value.func)
        init_args = plain(value.keywords)
    path = f"{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', '')}"
    try:
        importable = imported(path) is made
    except UsageError:
        importable = False
    if not importable:
        return {NOT_SAVED: repr(value)}
    return {"class_path": path, **({"init_args": init_args} if init_args else {})}


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
    """The class or function of that import path.

    Raises:
        UsageError: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"{path!r} cannot be imported: give the path of a class or function ({error})") from error
