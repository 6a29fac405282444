"""Batch normalisation under Dale's principle: its gains stay non-negative."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_danns.errors import UsageError
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
        norm: torch's layer, which holds running mean and variance; ``sync_batchnorm=True`` of a Trainer converts it.

    Shape:
        u (N, n) -> z (N, n).

    Raises:
        UsageError: an input of another shape; in training, a batch that has one value of each unit.

    Example:
        >>> layer = DaleBatchNorm1d(3)
        >>> z = layer(torch.rand(100, 3))
        >>> bool(z.mean(0).abs().max() < 1e-5)
        True
    """

    nonnegative = ("g",)
    nonnegative_inputs = False
    of_torch: type[nn.BatchNorm1d | nn.BatchNorm2d] = nn.BatchNorm1d

    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm = self.of_torch(n, affine=False)
        self.g, self.b = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))

    def forward(self, u: Tensor) -> Tensor:
        norm = self.norm
        if u.dim() != 1 - self.unit_dim or u.shape[self.unit_dim] != norm.num_features:
            shape = f"(N, {norm.num_features}{', H, W' if self.unit_dim == -3 else ''})"
            raise UsageError(f"input of shape {tuple(u.shape)}: this layer takes {shape}")
        if isinstance(norm, nn.SyncBatchNorm):
            per_unit = (-1,) + (1,) * (-1 - self.unit_dim)
            return self.g.view(per_unit) * norm(u) + self.b.view(per_unit)
        if norm.training:
            if u.numel() == norm.num_features:
                raise UsageError(
                    "a batch has one value of each unit, which has no deviation: give a batch size that does not leave "
                    "one sample for the last batch"
                )
            norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        # not norm(u), whose result would be kept for the gradient of g
        return F.batch_norm(u, norm.running_mean, norm.running_var, self.g, self.b, norm.training, 0.1, norm.eps)


class DaleBatchNorm2d(DaleBatchNorm1d):
    """`DaleBatchNorm1d` of images: mean and variance of a channel are over samples and pixels.

    Shape:
        u (N, n, H, W) -> z (N, n, H, W).
    """

    unit_dim = -3
    of_torch = nn.BatchNorm2d
