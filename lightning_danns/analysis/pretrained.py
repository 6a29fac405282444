"""An ordinary layer's weights as excitation less inhibition, exactly."""

import torch
from torch import Tensor


@torch.no_grad()
def split_(W: Tensor, Wex: Tensor, Wix: Tensor, Wei: Tensor, groups: int = 1) -> None:
    """Fill three non-negative weights so that W = Wex - Wei Wix.

    The rows of W are cut in their order into as many groups G_k as there are interneurons:

        Wix_kj = max over i in G_k of max(-W_ij, 0)     the least that inhibits every unit of the group enough
        Wei_ik = 1 for i in G_k, 0 otherwise            each unit has one interneuron
        Wex    = W + Wei Wix                            >= 0

    Shapes are (ne, ...) of W and Wex, (ni, ...) of Wix, (ne, ni / groups) of Wei: each group of a grouped convolution
    has interneurons of its own.
    """
    Wei.zero_()
    for W_g, Wex_g, Wix_g, Wei_g in zip(*(weight.chunk(groups) for weight in (W, Wex, Wix, Wei)), strict=True):
        for k, rows in enumerate(torch.arange(len(W_g), device=W.device).tensor_split(len(Wix_g))):
            Wix_g[k] = W_g[rows].neg().clamp(min=0).amax(0)
            Wei_g[rows, k] = 1
            Wex_g[rows] = W_g[rows] + Wix_g[k]
