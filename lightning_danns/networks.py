"""Networks as sequences of layers: one builder per architecture, one family of layers per kind of unit.

An architecture (`mlp`, `cnn`, `resnet`) knows sizes and order; a family (`DANNFamily`, `StandardFamily`,
`ColumnEIFamily`) knows which layers stand for "n units that see d inputs". Any architecture can be built of any family
that has its layers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_danns.errors import UsageError
from lightning_danns.initialization import Inhibition, Inputs
from lightning_danns.layers import ColumnEILinear, DaleBatchNorm1d, DaleBatchNorm2d, DANNConv2d, DANNLinear

Norm = Literal["none", "layer", "group", "batch", "centred", "centred_batch"]
"""Normalisation of hidden ordinary layers: none; over a sample's units (layer), or over its channels and pixels (group,
one group); over the batch; weights alone, each row kept at mean 0 (centred), which is what balance does under Dale's
principle; or of such weights, over the batch (centred_batch)."""

DaleNorm = Literal["none", "batch"]
"""Normalisation of hidden units under Dale's principle: none, or over the batch (`DaleBatchNorm1d`)."""

Shortcut = Literal["after", "before"]
"""Where a residual block adds its input: after its last ReLU, or before it."""


class Network(nn.Sequential):
    """Layers one after another. With a forward of its own `compile` takes them whole, also in torch before 2.14."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Family(Protocol):
    """Makes the layers of one kind of unit."""

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        """Layers, without nonlinearity, from ``d`` inputs to ``n`` units with ``ni`` interneurons."""


class ConvFamily(Family, Protocol):
    """A family with convolutions."""

    def conv(self, c: int, n: int, ni: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        """A convolution padded to keep the size, from ``c`` to ``n`` channels with ``ni`` interneuron channels."""


@dataclass(frozen=True)
class DANNFamily:
    """Excitatory units with interneurons of their own (`DANNLinear`, `DANNConv2d`), not balanced if not said.

    With a ``norm``, hidden layers have no bias, where the normalisation has one, and divide only if ``divisive=True``.
    """

    divisive: bool | None = None
    balanced: bool = False
    inhibition: Inhibition | None = None
    eps: float | None = None
    norm: DaleNorm = "none"

    def __post_init__(self) -> None:
        if self.norm not in get_args(DaleNorm):
            raise UsageError(f"norm={self.norm!r}: networks under Dale's principle have 'none' or 'batch'")

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        inputs: Inputs = "pixels" if first else "rectified"
        plain = last or self.norm == "none"
        layer = DANNLinear(d, n, ni, inputs=inputs, bias=plain, **self._options())
        return [layer] if plain else [layer, DaleBatchNorm1d(n)]

    def conv(self, c: int, n: int, ni: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        plain = self.norm == "none"
        layer = DANNConv2d(c, n, ni, kernel, stride, padding=kernel // 2, bias=plain, **self._options())
        return [layer] if plain else [layer, DaleBatchNorm2d(n)]

    def _options(self) -> dict[str, Any]:
        divisive = self.norm == "none" if self.divisive is None else self.divisive
        return {**{name: value for name, value in vars(self).items() if name != "norm"}, "divisive": divisive}


@dataclass(frozen=True)
class StandardFamily:
    """Ordinary units, whose weights have any sign, with an optional normalisation of the hidden layers.

    W ~ N(0, k/d) for d inputs per unit; k = 1 in a first dense layer, 2 elsewhere; b = 0. Convolutions may go without
    a bias (``conv_bias``), where a normalisation has one.
    """

    norm: Norm = "none"
    conv_bias: bool = True

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise UsageError(f"norm={self.norm!r}: choose one of {', '.join(map(repr, get_args(Norm)))}")

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        linear = nn.Linear(d, n)
        nn.init.normal_(linear.weight, std=math.sqrt((1 if first else 2) / d))
        norms = {"layer": nn.LayerNorm, "group": nn.LayerNorm, "batch": nn.BatchNorm1d, "centred_batch": nn.BatchNorm1d}
        return self._normalised(linear, [] if last or self.norm not in norms else [norms[self.norm](n)])

    def conv(self, c: int, n: int, ni: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        if self.norm == "layer":
            raise UsageError(
                "norm='layer': convolutional networks have 'none', 'group', 'batch', 'centred' or 'centred_batch'"
            )
        norms: dict[str, Callable[[int], nn.Module]] = {
            "group": functools.partial(nn.GroupNorm, 1),
            "batch": nn.BatchNorm2d,
            "centred_batch": nn.BatchNorm2d,
        }
        conv = nn.Conv2d(c, n, kernel, stride, padding=kernel // 2, bias=self.conv_bias)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel**2 * c)))
        return self._normalised(conv, [norms[self.norm](n)] if self.norm in norms else [])

    def _normalised(self, layer: nn.Linear | nn.Conv2d, norm: list[nn.Module]) -> list[nn.Module]:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if self.norm in ("centred", "centred_batch"):
            parametrize.register_parametrization(layer, "weight", CentredRows())
        return [layer, *norm]


class CentredRows(nn.Module):
    """W_i. - mean_j W_ij: weights whose rows sum to 0, the ordinary layer's equivalent of balanced inhibition.

    As a parametrisation, it gives SGD (with momentum and decay too) the same weights as subtracting the mean of each
    row after every step.
    """

    def forward(self, W: Tensor) -> Tensor:
        return W - W.mean(tuple(range(1, W.dim())), keepdim=True)


@dataclass(frozen=True)
class ColumnEIFamily:
    """Units that excite or inhibit all their targets (`ColumnEILinear`), ``ratio`` excitatory to one inhibitory.

    Of d units below, the last ceil(d / (ratio + 1)) are inhibitory; pixels are all excitatory.
    """

    ratio: int = 10
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise UsageError(f"ratio={self.ratio}: at least one excitatory unit for each inhibitory one")

    def dense(self, d: int, n: int, ni: int, *, first: bool, last: bool) -> list[nn.Module]:
        ni = 0 if first else math.ceil(d / (self.ratio + 1))
        return [ColumnEILinear(d, n, ni, balanced=self.balanced and ni > 0)]


def interneurons(sizes: Sequence[int], ni: int | Sequence[int] | None) -> list[int]:
    """Interneurons of each hidden layer: as given, the same number in all, or a tenth of the layer's units."""
    if ni is None:
        return [tenth(ne) for ne in sizes]
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
) -> Network:
    """Flatten, then dense layers with ReLU between them; the output layer has one interneuron."""
    dense = _dense_layers(math.prod(input_shape), hidden_sizes, num_classes, family, ni, first=True)
    return Network(nn.Flatten(), *dense)


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
) -> Network:
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
    return Network(*layers, nn.Flatten(), *dense)


VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(depth: int, input_shape: Sequence[int], num_classes: int, family: ConvFamily, dropout: float = 0.5) -> Network:
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


RESNET_BLOCKS = {20: (3, 3, 3), 32: (5, 5, 5), 56: (9, 9, 9), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Residual blocks of each stage. 20, 32 and 56: for 32 x 32 pixels; 18, 34 and 50: for larger images."""


def resnet(
    depth: int,
    input_shape: Sequence[int],
    num_classes: int,
    family: ConvFamily,
    shortcut: Shortcut = "after",
    stem: Literal["auto", "small", "large"] = "auto",
) -> Network:
    """Residual network (He et al., CVPR 2016): a stem, stages of `ResidualBlock`s, mean over pixels, one dense layer.

    Stages are 16-32-64 channels wide for depths 20, 32 and 56, and 64-128-256-512 for 18, 34 and 50 (whose blocks are
    bottlenecks, four times as wide at their end); every stage but the first halves the image. Interneurons are a tenth
    of the channels.

    Args:
        depth: one of `RESNET_BLOCKS`.
        input_shape: (channels, height, width).
        num_classes: units of the output layer.
        family: what the layers are.
        shortcut: where a block adds its input, see `ResidualBlock`.
        stem: ``"small"``, one 3x3 convolution; ``"large"``, 7x7 with stride 2 and max-pooling. ``"auto"``: large
            for depths 18, 34 and 50 and images of more than 64 pixels.

    Raises:
        UsageError: a depth or option that does not exist, or an image that is not (channels, height, width).
    """
    if depth not in RESNET_BLOCKS:
        raise UsageError(f"depth={depth}: residual networks have depth {', '.join(map(str, RESNET_BLOCKS))}")
    if shortcut not in get_args(Shortcut):
        raise UsageError(f"shortcut={shortcut!r}: choose 'after' or 'before'")
    if stem not in ("auto", "small", "large"):
        raise UsageError(f"stem={stem!r}: choose 'auto', 'small' or 'large'")
    if len(input_shape) != 3:
        raise UsageError(f"input_shape={list(input_shape)}: a residual network needs (channels, height, width)")
    blocks, bottleneck = RESNET_BLOCKS[depth], depth == 50
    width = 16 if len(blocks) == 3 else 64
    if stem == "auto":
        stem = "large" if len(blocks) == 4 and max(input_shape[1:]) > 64 else "small"
    layers: list[nn.Module] = [*family.conv(input_shape[0], width, tenth(width), *((7, 2) if stem == "large" else ()))]
    layers += [nn.ReLU(), *([nn.MaxPool2d(3, 2, padding=1)] if stem == "large" else [])]
    channels = width
    for stage, count in enumerate(blocks):
        for k in range(count):
            stride = 2 if stage > 0 and k == 0 else 1
            block = ResidualBlock(channels, width * 2**stage, stride, family, bottleneck, shortcut)
            layers.append(block)
            channels = block.out_channels
    dense = family.dense(channels, num_classes, 1, first=False, last=True)
    return Network(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *dense)


def tenth(n: int) -> int:
    """Interneurons of ``n`` excitatory units if nothing else is said: a tenth, at least one."""
    return max(1, n // 10)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, and a shortcut around them.

    Both places of the shortcut keep what the next layer sees non-negative, because x >= 0:

        after:  h = x + ReLU(f(x))       two excitatory pathways converge
        before: h = ReLU(x + f(x))       the usual one: x excites the units whose drive is f(x)

    Where width or size change, x goes through a 1x1 convolution; after ReLU if its units must not be negative
    (``after``).

    Args:
        c: input channels.
        n: channels of the 3x3 convolutions.
        stride: of the first 3x3 convolution and of the shortcut.
        family: what the layers are.
        bottleneck: whether 1x1 convolutions to n and to 4 n channels surround a single 3x3 convolution.
        shortcut: ``"after"`` or ``"before"``.

    Shape:
        x (N, c, H, W) -> h (N, n or 4 n, H / stride, W / stride).
    """

    def __init__(self, c: int, n: int, stride: int, family: ConvFamily, bottleneck: bool, shortcut: Shortcut) -> None:
        super().__init__()
        self.out_channels = 4 * n if bottleneck else n
        self.before = shortcut == "before"
        convolutions = (
            [(c, n, 1, 1), (n, n, 3, stride), (n, 4 * n, 1, 1)] if bottleneck else [(c, n, 3, stride), (n, n, 3, 1)]
        )
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, step in convolutions:
            layers += [*family.conv(inputs, outputs, tenth(outputs), kernel, step), nn.ReLU()]
        self.body = nn.Sequential(*(layers[:-1] if self.before else layers))
        self.shortcut = nn.Sequential()
        if stride != 1 or c != self.out_channels:
            self.shortcut.extend(family.conv(c, self.out_channels, tenth(self.out_channels), 1, stride))
            if not self.before:
                self.shortcut.append(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        h = self.shortcut(x) + self.body(x)
        return torch.relu(h) if self.before else h


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
    if isinstance(hidden_sizes, Integral):
        raise UsageError(f"hidden_sizes={hidden_sizes}: give a list, one size for each hidden layer")
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
