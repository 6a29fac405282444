"""Sign-constrained columns: the simplest way to obey Dale's principle, and the one that learns badly."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_danns.errors import UsageError
from lightning_danns.initialization import exponential_
from lightning_danns.layers.dale import Balance, DaleModule, DANNComponents, balance_, total


class ColumnEILinear(DaleModule):
    r"""Dense layer in which every *input* is excitatory or inhibitory (the ColEI networks of Cornford et al., 2021).

    .. math:: z = (W D) x + b, \quad W \ge 0, \quad D = \mathrm{diag}(+1, ..., +1, -1, ..., -1)

    The last ``ni`` of the d inputs are the inhibitory ones: a unit of the layer below excites all its targets, or
    inhibits all of them. ``W`` stays >= 0 (`DaleProjection` or `project_`); ``b`` is free.

    Initialisation: excitatory columns exponential with mean s_e, inhibitory ones with s_i = (n_e / n_i) s_e, where
    1 / s_e^2 = (2 pi - 1) / (2 pi) (n_e + n_e^2 / n_i), so that z has mean 0 and variance 1 for x = ReLU(N(0, 1)).
    Without inhibitory inputs (the first layer, which sees pixels), all with mean 1 / sqrt(d); `centre_` then sets the
    bias.

    Args:
        in_features: number of inputs d.
        out_features: number of units.
        ni: number of inhibitory inputs, from 0 to d - 1.
        bias: whether to add ``b``.
        balanced: whether the inhibitory weights onto each unit are kept equal in sum to its excitatory ones, by scaling
            them after each step (`project_`). Without inhibitory inputs there is nothing to balance.
        device, dtype: as in `torch.nn.Linear`.

    Attributes:
        W: (out_features, d).
        b: (out_features,), starts at 0; None without bias.
        sign: (d,), the diagonal of D; a buffer.

    Shape:
        x (\*, d) -> z (\*, out_features).

    Raises:
        UsageError: ni outside 0..d-1, or an input of another width.

    Example:
        >>> layer = ColumnEILinear(550, 550, ni=50)
        >>> layer(torch.rand(32, 550)).shape
        torch.Size([32, 550])
        >>> bool((layer.W >= 0).all())
        True
    """

    nonnegative = ("W",)
    balancing = ("W",)
    sign: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ni: int,
        *,
        bias: bool = True,
        balanced: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise UsageError(f"in_features={in_features}, out_features={out_features}: both must be at least 1")
        if not 0 <= ni < in_features:
            raise UsageError(f"ni={ni}: of in_features={in_features} inputs, from 0 to all but one can be inhibitory")
        self.in_features, self.out_features, self.ni, self.balanced = in_features, out_features, ni, balanced
        self.W = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("sign", torch.empty(in_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights; see the class. Sets the signs too, which `torch.nn.Module.to_empty` loses."""
        d, ni = self.in_features, self.ni
        self.sign[: d - ni] = 1
        self.sign[d - ni :] = -1
        if ni == 0:
            exponential_(self.W, 1 / math.sqrt(d))
        else:
            ne = d - ni
            s_e = 1 / math.sqrt((2 * math.pi - 1) / (2 * math.pi) * (ne + ne**2 / ni))
            exponential_(self.W[:, :ne], s_e)
            exponential_(self.W[:, ne:], s_e * ne / ni)
        if self.b is not None:
            self.b.zero_()
        if self.balanced:
            balance_(self)

    def balance(self) -> Balance | None:
        """Sums over the excitatory and over the inhibitory inputs, whose weights are scaled."""
        if self.ni == 0:
            return None
        ne = self.in_features - self.ni
        return Balance(total(self.W[:, :ne]), total(self.W[:, ne:]), self.W[:, ne:])

    @torch.no_grad()
    def standardise_(self, mean: Tensor, std: Tensor) -> None:
        """z becomes (z - mean) / std by the rows of W, whose signs and balance stay, and by b."""
        self.W.div_(std[:, None])
        if self.b is not None:
            self.b.sub_(mean).div_(std)

    @torch.no_grad()
    def centre_(self, pixel_mean: float) -> None:
        """Set b = -sqrt(d) pixel_mean, so that an all-excitatory layer starts with mean drive 0 on such images.

        Raises:
            UsageError: the layer has no bias, or inhibitory inputs.
        """
        if self.b is None:
            raise UsageError("this layer has no bias to centre: make it with bias=True")
        if self.ni:
            raise UsageError(f"{self.ni} inputs of this layer are inhibitory, and centre its drive already")
        self.b.fill_(-math.sqrt(self.in_features) * pixel_mean)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise UsageError(
                f"input of shape {tuple(x.shape)}: this layer takes {self.in_features} features in the last dimension"
            )
        if self.balanced:
            return F.linear(x, self.net_weight(), self.b)
        return F.linear(x * self.sign, self.W, self.b)

    def components(self, x: Tensor) -> DANNComponents:
        """Drive from the excitatory inputs, the inhibitory inputs, and what they subtract, for analysis."""
        ne, net = self.in_features - self.ni, self.net_weight()
        z_e, subtraction = F.linear(x[..., :ne], net[:, :ne]), F.linear(x[..., ne:], -net[:, ne:])
        z = z_e - subtraction
        return DANNComponents(z_e, x[..., ne:], subtraction, None, z if self.b is None else z + self.b)

    def net_weight(self) -> Tensor:
        """W D, its inhibitory part in balance if it is to be."""
        if self.balanced and self.ni:
            return torch.cat([self.W[:, : -self.ni], -self.in_balance().to(self.W.dtype)], 1)
        return self.W * self.sign

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ni={self.ni}, "
            f"bias={self.b is not None}, balanced={self.balanced}"
        )
