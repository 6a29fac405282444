"""Networks as sequences of layers: one builder per architecture, one family of layers per kind of unit.

An architecture (`mlp`) knows sizes and order; a family (`DANNFamily`, `StandardFamily`) knows which layers stand
for "n units that see d inputs". Any architecture can be built of any family.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from torch import nn

from lightning_danns.errors import UsageError
from lightning_danns.layers import DANNLinear

Norm = Literal["none", "layer", "batch"]


class Family(Protocol):
    """Makes the layers of one kind of unit."""

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        """Layers, without nonlinearity, from ``d`` inputs to ``n`` units with ``ni`` interneurons."""


@dataclass(frozen=True)
class DANNFamily:
    """Excitatory units with interneurons of their own (`DANNLinear`)."""

    divisive: bool = True

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        return [DANNLinear(d, n, ni, divisive=self.divisive, inputs="pixels" if first else "rectified")]


@dataclass(frozen=True)
class StandardFamily:
    """Ordinary units, whose weights have any sign, with an optional normalisation of the hidden layers."""

    norm: Norm = "none"

    def __post_init__(self) -> None:
        if self.norm not in ("none", "layer", "batch"):
            raise UsageError(f"norm={self.norm!r}: choose 'none', 'layer' or 'batch'")

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        linear = nn.Linear(d, n)
        nn.init.normal_(linear.weight, std=math.sqrt((1 if first else 2) / d))
        nn.init.zeros_(linear.bias)
        if last or self.norm == "none":
            return [linear]
        return [linear, nn.LayerNorm(n) if self.norm == "layer" else nn.BatchNorm1d(n)]


def interneurons(hidden_sizes: Sequence[int], ni: int | Sequence[int] | None) -> list[int]:
    """Interneurons of each hidden layer: as given, the same number in all, or a tenth of the layer's units."""
    if ni is None:
        return [max(1, ne // 10) for ne in hidden_sizes]
    counts = [ni] * len(hidden_sizes) if isinstance(ni, int) else list(ni)
    if len(counts) != len(hidden_sizes):
        raise UsageError(
            f"ni={ni} has {len(counts)} entries for the {len(hidden_sizes)} hidden layers {list(hidden_sizes)}: "
            "give one number for all or one each"
        )
    return counts


def mlp(
    input_shape: Sequence[int],
    hidden_sizes: Sequence[int],
    num_classes: int,
    family: Family,
    ni: int | Sequence[int] | None = None,
) -> nn.Sequential:
    """Flatten, then dense layers with ReLU between them; the output layer has one interneuron."""
    sizes = [math.prod(input_shape), *hidden_sizes, num_classes]
    if min(sizes) < 1:
        raise UsageError(
            f"input_shape={list(input_shape)}, hidden_sizes={list(hidden_sizes)}, num_classes={num_classes}: "
            "all sizes must be at least 1"
        )
    counts = [*interneurons(hidden_sizes, ni), 1]
    layers: list[nn.Module] = [nn.Flatten()]
    for k, ((d, n), count) in enumerate(zip(pairwise(sizes), counts, strict=True)):
        last = k == len(hidden_sizes)
        layers += family.dense(d, n, count, first=k == 0, last=last)
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
