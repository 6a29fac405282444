"""The convolutional layer of Dale's ANNs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danns.errors import UsageError
from lightning_danns.initialization import Inhibition
from lightning_danns.layers.dann import DANN, at_least_float32
from lightning_danns.layers.fused import Quotient, in_half, transformed

Pair = int | tuple[int, int]


def _pair(value: Pair) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise UsageError(f"{value!r}: give a whole number or a pair of them")
    return (pair[0], pair[1])


class DANNConv2d(DANN):
    r"""Convolution with ``ne`` excitatory channels under subtractive and divisive feedforward inhibition.

    Cornford et al., ICLR 2021 (openreview.net/forum?id=eU776ZYxEpz). Two convolutions of one geometry, then at every
    pixel, over channels:

    .. math::
        e = W_{ex} * x, \quad i = W_{ix} * x, \quad
        z = g \odot \frac{e - W_{ei} i}{W_{ei} (e^{\alpha} \odot i) + \epsilon} + b

    with the symbols of `DANNLinear`; a 1x1 convolution of a 1x1 image is that layer. Stands where `torch.nn.Conv2d`
    does. With ``groups`` it equals that many independent layers side by side, each with ``ni / groups`` interneurons.

    ``Wex, Wix, Wei, g`` stay >= 0: `DaleProjection`, or `project_` in your own loop, clamps them after every optimizer
    step. Initialisation as in the dense layer with :math:`d = C k_H k_W` inputs per unit (per group).

    Args:
        in_channels: number of input channels C.
        ne: number of excitatory (output) channels.
        ni: number of interneuron channels, from 1 to ``ne``; about a tenth of ``ne``.
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.Conv2d`.
        divisive: whether inhibition also divides.
        bias: whether to add ``b``.
        inhibition, balanced, eps: see `DANNLinear`. Totals are over a group's channels and the kernel; balance is not
            exact at zero-padded borders, where a part of the kernel sees nothing.
        device, dtype: as in `torch.nn.Conv2d`.

    Attributes:
        Wex: (ne, C / groups, kH, kW).
        Wix: (ni, C / groups, kH, kW).
        Wei: (ne, ni / groups).
        alpha: (ni,); None without division.
        g: (ne,); None without division.
        b: (ne,); None without bias.

    Shape:
        x (N, C, H, W) or (C, H, W) -> z (N, ne, H', W') or (ne, H', W') as `torch.nn.Conv2d`.

    Raises:
        UsageError: ni outside 1..ne, eps not positive, groups that do not divide the channels, a geometry that has no
            output, or an input of other channels.

    Example:
        >>> layer = DANNConv2d(3, ne=64, ni=10, kernel_size=3, padding=1)
        >>> layer(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 64, 32, 32])
        >>> all(bool((p >= 0).all()) for _, p in layer.nonnegative_parameters())
        True
    """

    unit_dim = -3

    def __init__(
        self,
        in_channels: int,
        ne: int,
        ni: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        *,
        divisive: bool = True,
        bias: bool = True,
        inhibition: Inhibition | None = None,
        balanced: bool = False,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups < 1 or any(channels % groups for channels in (in_channels, ne, ni)):
            raise UsageError(f"groups={groups} must divide in_channels={in_channels}, ne={ne} and ni={ni}")
        kernel, step, spread = _pair(kernel_size), _pair(stride), _pair(dilation)
        if in_channels < 1 or min(*kernel, *step, *spread) < 1:
            raise UsageError(
                f"in_channels={in_channels}, kernel_size={kernel_size}, stride={stride}, dilation={dilation}: "
                "all must be at least 1"
            )
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise UsageError(f"padding={padding!r}: give a number, a pair, 'same' or 'valid'")
            if padding == "same" and step != (1, 1):
                raise UsageError(f"padding='same' needs stride 1, not {stride}")
        elif min(_pair(padding)) < 0:
            raise UsageError(f"padding={padding}: it must be at least 0")
        self.in_channels, self.kernel_size, self.stride, self.dilation = in_channels, kernel, step, spread
        self.padding: tuple[int, int] | str = padding if isinstance(padding, str) else _pair(padding)
        shape = (in_channels // groups, *kernel)
        super().__init__(shape, ne, ni, divisive, bias, "rectified", inhibition, balanced, eps, device, dtype, groups)

    def _refuse_misfit(self, x: Tensor) -> None:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise UsageError(
                f"input of shape {tuple(x.shape)}: this layer takes (N, {self.in_channels}, H, W) or "
                f"({self.in_channels}, H, W)"
            )
        for size, kernel, spread, k in zip(x.shape[-2:], self.kernel_size, self.dilation, (0, 1), strict=True):
            padded = size + 2 * self.padding[k] if isinstance(self.padding, tuple) else size
            if self.padding != "same" and padded < (extent := spread * (kernel - 1) + 1):
                raise UsageError(
                    f"input of shape {tuple(x.shape)}: the kernel extends over {extent} pixels, the padded image over "
                    f"{padded}"
                )

    def forward(self, x: Tensor) -> Tensor:
        self._refuse_misfit(x)
        # Wei Wix costs ne ni d, and spares ne ni for each pixel. Elsewhere than on CPUs, convolutions may round float32
        # (TF32): then what is folded loses less.
        pixels = x.numel() // (self.in_channels * self.stride[0] * self.stride[1])  # about as many come out
        if not x.is_cpu or in_half(x) or transformed() or pixels > self.d:
            return self._folded(x)
        return self.components(x).z

    def _drive(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _divide(self, z_e: Tensor, z_i: Tensor, Wei: Tensor, eps: float) -> Tensor:
        if self.groups > 1 or transformed():
            return super()._divide(z_e, z_i, Wei, eps)
        if z_e.dim() == 3:
            return self._divide(z_e[None], z_i[None], Wei, eps)[0]
        # z_i alone: a view would keep both drives for the backward pass
        u: Tensor = Quotient.apply(z_e, z_i.clone(), at_least_float32(Wei), eps)
        return u if self.b is not None else u.clone()  # a nonlinearity in place must not change what is kept

    def _inhibit(self, Wei: Tensor, z_i: Tensor) -> Tensor:
        return F.conv2d(z_i, at_least_float32(Wei)[:, :, None, None], groups=self.groups)

    def _per_unit(self, values: Tensor) -> Tensor:
        return values[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, ne={self.ne}, ni={self.ni}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, {self._options()}"
        )
