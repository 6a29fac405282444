"""The dense layer of Dale's ANNs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danns.errors import UsageError
from lightning_danns.initialization import Inhibition, Inputs
from lightning_danns.layers.dann import DANN, at_least_float32
from lightning_danns.layers.fused import DivisiveLinear, drives_in_balance, in_half, transformed


class DANNLinear(DANN):
    r"""Dense layer of ``ne`` excitatory units under subtractive and divisive feedforward inhibition.

    Cornford et al., ICLR 2021 (openreview.net/forum?id=eU776ZYxEpz):

    .. math::
        z = g \odot \frac{W_{ex} x - W_{ei} W_{ix} x}{W_{ei} (e^{\alpha} \odot W_{ix} x) + \epsilon} + b

    with inputs :math:`x \ge 0`, excitatory weights :math:`W_{ex}`, the weights :math:`W_{ix}` of the ``ni``
    interneurons, their weights :math:`W_{ei}` onto the excitatory units, log gains :math:`\alpha` of division, gains
    :math:`g`, biases :math:`b` and a small :math:`\epsilon`. With ``divisive=False``:
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
        inhibition: how inhibition starts. ``"mean"``, as published: Wei at 1/ni, Wix drawn like Wex; ``"iid"``: both
            drawn independently; ``"groups"``: Wix the mean rows of ni random groups of units, so that Wei Wix is
            exactly the mean row of Wex. Not given: ``"groups"`` if balanced, otherwise ``"mean"``.
        balanced: whether each unit's total inhibition is kept equal to its total excitation: every row of
            Wex - Wei Wix sums to 0, so that an input that is the same everywhere is cancelled exactly. `project_` and
            `DaleProjection` do it after each step, by scaling the rows of Wei, and the layer computes with Wei so
            scaled (`in_balance`), so that gradients are those of a layer in balance. To cut interneurons of a trained
            layer, set ``layer.balanced = False`` first: otherwise the others make up for them.
        eps: what is added to gamma, > 0: the semi-saturation constant of division. Not given: 1e-8, as published, or
            0.3 if balanced (`lightning_danns.layers.dann.BALANCED_EPS` says why).
        device, dtype: as in `torch.nn.Linear`.

    Attributes:
        Wex: (ne, d), starts exponential with mean s.
        Wix: (ni, d), starts exponential with mean s; the mean row of Wex if ni = 1.
        Wei: (ne, ni), starts at 1/ni, or at the share of its group's units; rows are scaled if balanced.
        alpha: (ni,), starts at log √((2π - 1)/d); None without division.
        g: (ne,), starts at 1; None without division.
        b: (ne,), starts at 0; None without bias.

    Shape:
        x (\*, d) with any leading dimensions -> z (\*, ne).

    Raises:
        UsageError: ni outside 1..ne, eps not positive, unknown ``inputs`` or ``inhibition``, or an input of another
            width.

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
        inhibition: Inhibition | None = None,
        balanced: bool = False,
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if in_features < 1:
            raise UsageError(f"in_features={in_features}: a layer needs at least one input")
        super().__init__((in_features,), ne, ni, divisive, bias, inputs, inhibition, balanced, eps, device, dtype)

    def _refuse_misfit(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.d or not x.is_floating_point():
            raise UsageError(
                f"input of shape {tuple(x.shape)} and {x.dtype}: this layer takes {self.d} features in the last "
                "dimension, as floating-point numbers"
            )

    def forward(self, x: Tensor) -> Tensor:
        self._refuse_misfit(x)
        if in_half(x):
            return self._folded(x)
        # the totals come with the drives where products do not round them (TF32), and if a subclass has no other ones
        own = type(self).balance is DANN.balance and type(self).in_balance is DANN.in_balance
        within = self.balanced and own and x.is_cpu
        if transformed() or (self.alpha is None and not within):
            return self.components(x).z
        rows = x if x.dim() == 2 else x.reshape(-1, self.d)
        if self.alpha is None:
            z_e, z_i, Wei, *_ = drives_in_balance(rows, self.Wex, self.Wix, self.Wei)
            z = torch.addmm(z_e, z_i, Wei.t(), alpha=-1)
            z = z if self.b is None else z + self.b
        else:
            Wei = self.Wei if within else self._weights_onto_units()
            z = DivisiveLinear.apply(rows, self.Wex, self.Wix, Wei, self.alpha, self.g, self.b, self.eps, within)
        return z if x.dim() == 2 else z.view(*x.shape[:-1], self.ne)

    def _drive(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def _inhibit(self, Wei: Tensor, z_i: Tensor) -> Tensor:
        return F.linear(z_i, at_least_float32(Wei))

    def _per_unit(self, values: Tensor) -> Tensor:
        return values

    def extra_repr(self) -> str:
        return f"in_features={self.d}, ne={self.ne}, ni={self.ni}, {self._options()}"
