"""What a sweep searches: ranges of config keys, and points that cover them."""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_danns.errors import UsageError

if TYPE_CHECKING:
    import optuna

KINDS = "log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:A,B,..."


class Axis(NamedTuple):
    """One searched key: the values of ``kind`` from ``low`` to ``high``, or one of ``choices``."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def at(self, u: float) -> Any:
        """The value at ``u`` in [0, 1] of the axis."""
        if self.kind == "choice":
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "log":
            value = float(f"{self.low * (self.high / self.low) ** u:.6g}")
            return min(max(value, self.low), self.high)
        value = self.low + u * (self.high - self.low)
        return round(value) if self.kind == "int" else value

    def __str__(self) -> str:
        return (
            f"{self.key} ({', '.join(self.choices) if self.choices else f'{self.kind} {self.low:g} to {self.high:g}'})"
        )

    def suggest(self, trial: "optuna.Trial") -> Any:
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.choices)
        if self.kind == "int":
            return trial.suggest_int(self.key, int(self.low), int(self.high))
        return trial.suggest_float(self.key, self.low, self.high, log=self.kind == "log")


def parse_axis(text: str) -> Axis:
    """``KEY=KIND:...`` as an axis.

    Raises:
        UsageError: it is not of that form, or holds no range.
    """
    key, _, space = text.partition("=")
    kind, _, rest = space.partition(":")
    key = key.removeprefix("--")
    if not key or kind not in ("log", "uniform", "int", "choice") or not rest:
        raise UsageError(f"--search {text}: it must be KEY= and one of {KINDS}")
    if kind == "choice":
        choices = tuple(rest.split(","))
        if len(set(choices)) < 2 or len(set(choices)) < len(choices):
            raise UsageError(f"--search {text}: there must be two choices or more, all different")
        return Axis(key, kind, choices=choices)
    try:
        low, high = (int(end) if kind == "int" else float(end) for end in rest.split(":"))
    except ValueError:
        raise UsageError(f"--search {text}: after {kind}: there must be two numbers, LOW:HIGH") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--search {text}: {rest} is no range, its low end must be below its high end")
    if kind == "log" and low <= 0:
        raise UsageError(f"--search {text}: a logarithmic range must begin above 0")
    return Axis(key, kind, low, high)


def design(axes: Sequence[Axis], number: int) -> list[dict[str, Any]]:
    """``number`` points that cover each axis evenly, its ends included; for several axes, a Latin hypercube."""
    generator = random.Random(0)
    columns = []
    for _ in axes:
        column = [k / (number - 1) if number > 1 else 0.5 for k in range(number)]
        generator.shuffle(column)  # so that the first trials, which the pruner compares with, are from everywhere
        columns.append(column)
    return [{axis.key: axis.at(u) for axis, u in zip(axes, point, strict=True)} for point in zip(*columns, strict=True)]
