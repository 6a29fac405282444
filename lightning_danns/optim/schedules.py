"""Schedules that scale every group's rate alike, so that learning-rate factors survive them."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from lightning_danns.errors import UsageError
from lightning_danns.optim.groups import require_factors


class WarmupCosine(LambdaLR):
    r"""Linear warm-up, then half a cosine down to a floor, of every group's own rate.

    With :math:`t` steps done of :math:`T`, :math:`w` of them warm-up, and floor :math:`f`, rates are multiplied by

    .. math:: (t + 1) / w \quad (t < w), \qquad f + (1 - f) (1 + \cos(\pi (t - w) / (T - w))) / 2 \quad (t \ge w)

    Args:
        optimizer: whose rates it scales.
        total: T, in steps of the scheduler. A module takes it from its Trainer if it is not given.
        warmup: w; a number of steps, or a share of ``total`` if below 1.
        floor: f, the last rate relative to the first; scaling it with the rate keeps the factors, which a positive
            ``eta_min`` would not.
        interval: whether a module steps it after each optimizer step or each epoch.

    Raises:
        UsageError: an argument out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int | None = None,
        warmup: float = 0.05,
        floor: float = 0.0,
        interval: Literal["step", "epoch"] = "step",
    ) -> None:
        if total is None or total < 1:
            raise UsageError(f"total={total}: give the number of {interval}s (at least 1) that the schedule spans")
        if warmup < 0 or not 0 <= floor <= 1 or interval not in ("step", "epoch"):
            raise UsageError(
                f"warmup={warmup}, floor={floor}, interval={interval!r}: warmup must be at least 0, floor from 0 to 1, "
                "interval 'step' or 'epoch'"
            )
        w = warmup * total if warmup < 1 else warmup
        if w >= total and total > 1:
            raise UsageError(f"warmup={warmup} leaves nothing of total={total} {interval}s for the cosine")
        self.interval = interval

        def factor(t: int) -> float:
            if t < w:
                return (t + 1) / math.ceil(w)
            return floor + (1 - floor) * (1 + math.cos(math.pi * min((t - w) / max(total - w, 1), 1))) / 2

        super().__init__(optimizer, factor)


class Sequential(SequentialLR):
    """`torch.optim.lr_scheduler.SequentialLR` of schedulers that are given as functions, so that a config can name it:

        lr_scheduler:
          class_path: lightning_danns.Sequential
          init_args:
            schedulers:
            - {class_path: torch.optim.lr_scheduler.LinearLR, init_args: {total_iters: 5}}
            - {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 45}}
            milestones: [5]

    Args:
        optimizer: whose rates they scale.
        schedulers: functions from an optimizer to a scheduler.
        milestones: steps at which the next one takes over.
        interval: whether a module steps it after each optimizer step or each epoch.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Callable[[Optimizer], LRScheduler]],
        milestones: list[int],
        interval: Literal["step", "epoch"] = "epoch",
    ) -> None:
        self.interval = interval
        self.schedulers = [make(optimizer) for make in schedulers]
        super().__init__(optimizer, self.schedulers, milestones)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state.pop("schedulers", None)  # their states are in it already
        return state


def rehearse(factory: Callable[[Optimizer], Any], optimizer: Optimizer, steps: int = 1000) -> None:
    """Run the scheduler on a stand-in for ``optimizer`` and refuse it if the learning-rate factors do not survive.

    A scheduler that sets absolute rates (OneCycleLR, CyclicLR, a positive eta_min or min_lr) would otherwise undo the
    factors without a word, perhaps hours into a run.

    Args:
        factory: makes the scheduler of an optimizer.
        optimizer: as `fisher_optimizer` returns it; only its type, defaults and rates are read.
        steps: how many scheduler steps to look ahead.

    Raises:
        UsageError: see `require_factors`.
    """
    if len(optimizer.param_groups) == 1:
        return
    stand_in = _StandIn(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = factory(stand_in)
        require_factors(stand_in, type(scheduler).__name__)
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        for _ in range(steps):
            stand_in.step()
            try:
                scheduler.step(1.0) if plateau else scheduler.step()
            except ValueError:  # schedulers of a fixed length refuse further steps
                return
            require_factors(stand_in, type(scheduler).__name__)


class _StandIn(Optimizer):
    """An optimizer with another's groups and options, over parameters of one number each."""

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": [nn.Parameter(torch.zeros(()))]}
            for group in optimizer.param_groups
        ]
        super().__init__(groups, dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Schedulers expect a step between theirs."""
