"""Networks as sequences of layers: one builder per architecture, one family of layers per kind of unit.

An architecture (`mlp`, `cnn`) knows sizes and order; a family (`DANNFamily`, `StandardFamily`, `ColumnEIFamily`) knows
which layers stand for "n units that see d inputs". Any architecture can be built of any family that has its layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from torch import nn

from lightning_danns.errors import UsageError
from lightning_danns.layers import ColumnEILinear, DANNConv2d, DANNLinear

Norm = Literal["none", "layer", "batch"]


class Family(Protocol):
    """Makes the layers of one kind of unit."""

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        """Layers, without nonlinearity, from ``d`` inputs to ``n`` units with ``ni`` interneurons."""


class ConvFamily(Family, Protocol):
    """A family with convolutions."""

    def conv(self, c: int, n: int, ni: int) -> list[nn.Module]:
        """A 3x3 convolution that keeps the size, from ``c`` to ``n`` channels with ``ni`` interneuron channels."""


@dataclass(frozen=True)
class DANNFamily:
    """Excitatory units with interneurons of their own (`DANNLinear`, `DANNConv2d`)."""

    divisive: bool = True

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        return [DANNLinear(d, n, ni, divisive=self.divisive, inputs="pixels" if first else "rectified")]

    def conv(self, c: int, n: int, ni: int) -> list[nn.Module]:
        return [DANNConv2d(c, n, ni, kernel_size=3, padding=1, divisive=self.divisive)]


@dataclass(frozen=True)
class StandardFamily:
    """Ordinary units, whose weights have any sign, with an optional normalisation of the hidden layers.

    W ~ N(0, k/d) for d inputs per unit; k = 1 in a first dense layer, 2 elsewhere; b = 0.
    """

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

    def conv(self, c: int, n: int, ni: int) -> list[nn.Module]:
        if self.norm == "layer":
            raise UsageError("norm='layer': convolutional networks have 'none' or 'batch'")
        conv = nn.Conv2d(c, n, kernel_size=3, padding=1)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * c)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        return [conv] if self.norm == "none" else [conv, nn.BatchNorm2d(n)]


@dataclass(frozen=True)
class ColumnEIFamily:
    """Units that excite or inhibit all their targets (`ColumnEILinear`), ``ratio`` excitatory to one inhibitory.

    Of d units below, the last ceil(d / (ratio + 1)) are inhibitory; pixels are all excitatory.
    """

    ratio: int = 10

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise UsageError(f"ratio={self.ratio}: at least one excitatory unit for each inhibitory one")

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        return [ColumnEILinear(d, n, ni=0 if first else math.ceil(d / (self.ratio + 1)))]


def interneurons(sizes: Sequence[int], ni: int | Sequence[int] | None) -> list[int]:
    """Interneurons of each hidden layer: as given, the same number in all, or a tenth of the layer's units."""
    if ni is None:
        return [max(1, ne // 10) for ne in sizes]
    counts = [ni] * len(sizes) if isinstance(ni, int) else list(ni)
    if len(counts) != len(sizes):
        raise UsageError(
            f"ni={ni} has {len(counts)} entries for the {len(sizes)} hidden layers {list(sizes)}: "
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
    dense = _dense_layers(math.prod(input_shape), hidden_sizes, num_classes, family, ni, first=True)
    return nn.Sequential(nn.Flatten(), *dense)


def cnn(
    input_shape: Sequence[int],
    blocks: Sequence[Sequence[int]],
    hidden_sizes: Sequence[int],
    num_classes: int,
    family: ConvFamily,
    conv_ni: int | Sequence[int] | None = None,
    ni: int | Sequence[int] | None = None,
    pool_to_one: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Blocks of 3x3 convolutions, each followed by ReLU, each block by 2x2 max-pooling; then dense layers as in `mlp`.

    Args:
        input_shape: (channels, height, width).
        blocks: channels of each convolution, block by block.
        hidden_sizes: units of each hidden dense layer.
        num_classes: units of the output layer.
        family: what the layers are.
        conv_ni: interneurons of each convolution; see `interneurons`.
        ni: interneurons of each hidden dense layer.
        pool_to_one: average the last feature map over all its pixels, so that larger images need no larger layer.
        dropout: probability of dropping a hidden dense unit.

    Raises:
        UsageError: the image is too small to be halved by every block, a size is not positive, or
            dropout is not a probability.
    """
    if len(input_shape) != 3:
        raise UsageError(f"input_shape={list(input_shape)}: a convolutional network needs (channels, height, width)")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout}: give a probability from 0 to below 1")
    channels, height, width = input_shape
    smallest = 2 ** len(blocks)
    if min(height, width) < smallest:
        raise UsageError(
            f"input_shape={list(input_shape)}: {len(blocks)} blocks that each halve the image need at least "
            f"{smallest} x {smallest} pixels"
        )
    flat = [n for block in blocks for n in block]
    if not flat or min(flat) < 1:
        raise UsageError(f"channels={list(flat)}: a convolutional network needs channels, each at least 1")
    counts = iter(interneurons(flat, conv_ni))
    layers: list[nn.Module] = []
    for block in blocks:
        for n in block:
            layers += [*family.conv(channels, n, next(counts)), nn.ReLU()]
            channels = n
        layers.append(nn.MaxPool2d(2))
    pixels = (height // smallest) * (width // smallest)
    if pool_to_one and pixels > 1:
        layers.append(nn.AdaptiveAvgPool2d(1))
        pixels = 1
    dense = _dense_layers(channels * pixels, hidden_sizes, num_classes, family, ni, first=False, dropout=dropout)
    return nn.Sequential(*layers, nn.Flatten(), *dense)


VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(
    depth: int, input_shape: Sequence[int], num_classes: int, family: ConvFamily, dropout: float = 0.5
) -> nn.Sequential:
    """VGG16 or VGG19: five blocks of convolutions, then dense layers of 4096, 4096 and ``num_classes`` units.

    Interneurons 10-20-40-80-80 in the blocks, 409, 409 and 1 in the dense layers. The last feature map is flattened if
    it is one pixel (images of 32 x 32) and averaged to one if it is larger.
    """
    if depth not in VGG_CONVOLUTIONS:
        raise UsageError(f"depth={depth}: VGGs have depth {' or '.join(map(str, VGG_CONVOLUTIONS))}")
    blocks = [[n] * count for n, count in zip(VGG_WIDTHS, VGG_CONVOLUTIONS[depth], strict=True)]
    conv_ni = [n * 10 // 64 for block in blocks for n in block]
    return cnn(
        input_shape, blocks, (4096, 4096), num_classes, family, conv_ni=conv_ni, pool_to_one=True, dropout=dropout
    )


def _dense_layers(
    d: int,
    hidden_sizes: Sequence[int],
    num_classes: int,
    family: Family,
    ni: int | Sequence[int] | None,
    *,
    first: bool,
    dropout: float = 0.0,
) -> list[nn.Module]:
    sizes = [d, *hidden_sizes, num_classes]
    if min(sizes) < 1:
        raise UsageError(
            f"{d} inputs, hidden_sizes={list(hidden_sizes)}, num_classes={num_classes}: all sizes must be at least 1"
        )
    counts = [*interneurons(hidden_sizes, ni), 1]
    layers: list[nn.Module] = []
    for k, ((d, n), count) in enumerate(zip(pairwise(sizes), counts, strict=True)):
        last = k == len(hidden_sizes)
        layers += family.dense(d, n, count, first=first and k == 0, last=last)
        if not last:
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
    return layers
