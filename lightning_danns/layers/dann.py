"""Dale's ANN layers: excitatory units, and interneurons that inhibit them by subtraction and by division.

    z_e   = Wex x                         excitatory drive
    z_i   = Wix x                         interneurons: linear, and >= 0 because x and Wix are
    gamma = Wei (exp(alpha) * z_i) + eps  divisive (shunting) inhibition
    z     = g * (z_e - Wei z_i) / gamma + b

Weights are W_post,pre with shape (post, pre). ``ne`` excitatory units, ``ni`` interneurons, ``d`` inputs per unit.
Source: Cornford et al., *Learning to live with Dale's principle*, ICLR 2021.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_danns.errors import UsageError
from lightning_danns.initialization import (
    Inputs,
    excitatory_scale,
    exponential_,
    inhibition_,
    inhibition_iid_,
    log_gain,
)
from lightning_danns.layers.dale import DaleModule

EPS = 1e-8
"""Added to gamma, so that a unit without any inhibition does not divide by zero."""


class DANNComponents(NamedTuple):
    """The parts of one layer's computation. With subtraction alone, ``gamma`` is None."""

    z_e: Tensor
    z_i: Tensor
    subtraction: Tensor
    gamma: Tensor | None
    z: Tensor


class DANN(DaleModule):
    """What the dense and the convolutional layer share: parameters, initialisation, factors and the equations.

    A subclass says how weights act on the input (`_drive`), how interneurons reach the excitatory units
    (`_inhibit`) and how one value per unit broadcasts (`_per_unit`).
    """

    nonnegative = ("Wex", "Wix", "Wei", "g")
    alpha: nn.Parameter | None
    g: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        input_shape: tuple[int, ...],
        ne: int,
        ni: int,
        divisive: bool,
        bias: bool,
        inputs: Inputs,
        inhibition: Literal["mean", "iid"],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if ne < 1:
            raise UsageError(f"ne={ne}: a layer needs at least one excitatory unit")
        if not 1 <= ni <= ne:
            raise UsageError(f"ni={ni}: the interneurons must number between 1 and ne={ne} (about a tenth of ne)")
        if inputs not in ("pixels", "rectified"):
            raise UsageError(f"inputs={inputs!r}: say 'pixels' (values in [0, 1]) or 'rectified' (ReLU outputs)")
        if inhibition not in ("mean", "iid"):
            raise UsageError(f"inhibition={inhibition!r}: choose 'mean' (Wei = 1/ni) or 'iid'")
        # ints of the whole layer: sharded parameters have smaller shapes
        self.ne, self.ni, self.d = ne, ni, math.prod(input_shape)
        self.divisive, self.inputs, self.inhibition = divisive, inputs, inhibition

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.Wex = empty(ne, *input_shape)
        self.Wix = empty(ni, *input_shape)
        self.Wei = empty(ne, ni)
        self.alpha = empty(ni) if divisive else None
        self.g = empty(ne) if divisive else None
        self.b = empty(ne) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights as the module docstring of `lightning_danns.initialization` describes."""
        s = excitatory_scale(self.d, self.inputs)
        exponential_(self.Wex, s)
        if self.inhibition == "iid":
            inhibition_iid_(self.Wix, self.Wei, s)
        else:
            inhibition_(self.Wix, self.Wei, self.Wex, s)
        if self.alpha is not None and self.g is not None:
            self.alpha.fill_(log_gain(self.d))
            self.g.fill_(1)
        if self.b is not None:
            self.b.zero_()

    def lr_factors(self) -> dict[str, float]:
        """Fisher corrections: Wix 1/√ne, Wei 1/d, alpha 1/(d √ne); Wex, g and b keep 1."""
        factors = {"Wix": 1 / math.sqrt(self.ne), "Wei": 1 / self.d}
        if self.divisive:
            factors["alpha"] = 1 / (self.d * math.sqrt(self.ne))
        return factors

    def components(self, x: Tensor) -> DANNComponents:
        """Every part of the computation for input ``x``, for analysis."""
        z_e = self._drive(x, self.Wex)
        z_i = self._drive(x, self.Wix)
        subtraction = self._inhibit(z_i)
        z, gamma = z_e - subtraction, None
        if self.alpha is not None and self.g is not None:
            # exp keeps the divisive gain positive, so alpha is never projected
            gamma = self._inhibit(self._per_unit(self.alpha.exp()) * z_i) + EPS
            z = self._per_unit(self.g) * z / gamma
        if self.b is not None:
            z = z + self._per_unit(self.b)
        return DANNComponents(z_e, z_i, subtraction, gamma, z)

    def forward(self, x: Tensor) -> Tensor:
        return self.components(x).z

    def _drive(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _inhibit(self, z_i: Tensor) -> Tensor:
        raise NotImplementedError

    def _per_unit(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def _options(self) -> str:
        return (
            f"divisive={self.divisive}, bias={self.b is not None}, "
            f"inputs={self.inputs!r}, inhibition={self.inhibition!r}"
        )


class DANNLinear(DANN):
    r"""Dense layer of ``ne`` excitatory units under subtractive and divisive feedforward inhibition.

    Cornford et al., ICLR 2021 (openreview.net/forum?id=eU776ZYxEpz):

    .. math::
        z = g \odot \frac{W_{ex} x - W_{ei} W_{ix} x}{W_{ei} (e^{\alpha} \odot W_{ix} x) + \epsilon} + b

    with inputs :math:`x \ge 0`, excitatory weights :math:`W_{ex}`, the weights :math:`W_{ix}` of the ``ni``
    interneurons, their weights :math:`W_{ei}` onto the excitatory units, log gains :math:`\alpha` of division, gains
    :math:`g`, biases :math:`b` and :math:`\epsilon = 10^{-8}`. With ``divisive=False``:
    :math:`z = (W_{ex} - W_{ei} W_{ix}) x + b`.

    Biology: as in cortex, only excitatory units project to the next layer; each layer has its own few interneurons,
    which see the same input as its excitatory units and inhibit them.

    ``Wex, Wix, Wei, g`` stay >= 0: `DaleProjection`, or `project_` in your own loop, clamps them after every optimizer
    step. ``alpha`` and ``b`` are free. At the start, inhibition centres and standardises the excitatory drive
    (`lightning_danns.initialization`).

    Args:
        in_features: number of inputs d.
        ne: number of excitatory (output) units.
        ni: number of interneurons, from 1 to ``ne``; about a tenth of ``ne``. An output layer has one.
        divisive: whether inhibition also divides.
        bias: whether to add ``b``.
        inputs: ``"rectified"`` (the ReLU output of a layer below) or ``"pixels"`` (values in [0, 1]); sets the
            scale of the first weights.
        inhibition: ``"mean"`` starts Wei at 1/ni; ``"iid"`` draws Wix and Wei independently.
        device, dtype: as in `torch.nn.Linear`.

    Attributes:
        Wex: (ne, d), starts exponential with mean s.
        Wix: (ni, d), starts exponential with mean s; the mean row of Wex if ni = 1.
        Wei: (ne, ni), starts at 1/ni.
        alpha: (ni,), starts at log √((2π - 1)/d); None without division.
        g: (ne,), starts at 1; None without division.
        b: (ne,), starts at 0; None without bias.

    Shape:
        x (\*, d) with any leading dimensions -> z (\*, ne).

    Raises:
        UsageError: ni outside 1..ne, unknown ``inputs`` or ``inhibition``, or an input of another width.

    Example:
        >>> layer = DANNLinear(784, ne=500, ni=50, inputs="pixels")
        >>> layer(torch.rand(32, 784)).shape
        torch.Size([32, 500])
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1e6)
        >>> layer(torch.rand(32, 784)).sum().backward()
        >>> optimizer.step()
        >>> from lightning_danns import project_
        >>> project_(layer)
        >>> all(bool((p >= 0).all()) for _, p in layer.nonnegative_parameters())
        True
    """

    def __init__(
        self,
        in_features: int,
        ne: int,
        ni: int,
        *,
        divisive: bool = True,
        bias: bool = True,
        inputs: Inputs = "rectified",
        inhibition: Literal["mean", "iid"] = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 1:
            raise UsageError(f"in_features={in_features}: a layer needs at least one input")
        super().__init__((in_features,), ne, ni, divisive, bias, inputs, inhibition, device, dtype)

    def _drive(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[-1] != self.d:
            raise UsageError(
                f"input of shape {tuple(x.shape)}: this layer takes {self.d} features in the last dimension"
            )
        return F.linear(x, weight)

    def _inhibit(self, z_i: Tensor) -> Tensor:
        return F.linear(z_i, self.Wei)

    def _per_unit(self, values: Tensor) -> Tensor:
        return values

    def extra_repr(self) -> str:
        return f"in_features={self.d}, ne={self.ne}, ni={self.ni}, {self._options()}"
