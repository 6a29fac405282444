"""Batch normalisation under Dale's principle: its gains stay non-negative."""

import torch
from torch import Tensor, nn

from lightning_danns.layers.dale import DaleModule


class DaleBatchNorm1d(DaleModule):
    r"""Each unit standardised over the batch, then a gain that stays non-negative, and a bias.

    .. math::
        z = g \odot \frac{u - \mathrm{mean}(u)}{\sqrt{\mathrm{var}(u) + \epsilon}} + b

    In evaluation mode, mean and variance are the running ones. They shift and scale a unit as a whole, and
    :math:`g \ge 0`, so what excites a unit before excites it after. Stands behind a layer without bias, of any sign of
    u: ``norm="batch"`` of `DANNMLP` and the others puts it there. `DaleProjection`, or `project_`, clamps ``g``.

    Source: Ioffe and Szegedy (2015), where a gain has any sign.

    Args:
        n: number of units.

    Attributes:
        g, b: (n,); 1 and 0 at the start.
        standardise: torch's layer, without gain and bias; ``sync_batchnorm=True`` of a Trainer converts it.

    Shape:
        u (N, n) -> z (N, n).

    Example:
        >>> layer = DaleBatchNorm1d(3)
        >>> z = layer(torch.rand(100, 3))
        >>> bool(z.mean(0).abs().max() < 1e-5)
        True
    """

    nonnegative = ("g",)
    nonnegative_inputs = False
    torchs: type[nn.BatchNorm1d | nn.BatchNorm2d] = nn.BatchNorm1d

    def __init__(self, n: int) -> None:
        super().__init__()
        self.standardise = self.torchs(n, affine=False)
        self.g, self.b = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, u: Tensor) -> Tensor:
        per_unit = (-1,) + (1,) * (-1 - self.unit_dim)
        return self.g.view(per_unit) * self.standardise(u) + self.b.view(per_unit)


class DaleBatchNorm2d(DaleBatchNorm1d):
    """`DaleBatchNorm1d` of images: mean and variance of a channel are over samples and pixels.

    Shape:
        u (N, n, H, W) -> z (N, n, H, W).
    """

    unit_dim = -3
    torchs = nn.BatchNorm2d
