"""How inhibition is initialised so that it centres and standardises the excitatory drive.

For x = ReLU(N(0, sd²)): E[x] = sd / √(2π) and E[x²] = sd² / 2. With excitatory weights of mean and standard
deviation s, std(z_e) / E[z_e] = √((2π - 1) / d), which is what exp(alpha) is set to. Weights are W_post,pre.
Every function fills its tensors in place and draws from torch's generators.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Inputs = Literal["pixels", "rectified"]
"""What a layer sees: ``"pixels"`` (values in [0, 1]) or ``"rectified"`` (the ReLU output of a layer below)."""


Inhibition = Literal["mean", "iid", "groups"]
"""How inhibition starts: see `inhibition_`, `inhibition_iid_` and `inhibition_groups_`."""


def excitatory_scale(d: int, inputs: Inputs) -> float:
    """Mean (= standard deviation) s of ``Wex`` for ``d`` inputs per unit.

    s² = 2π / (d (2π - 1)) for rectified inputs, s² = 1 / (2d) for pixels.
    """
    if inputs == "rectified":
        return math.sqrt(2 * math.pi / (d * (2 * math.pi - 1)))
    return math.sqrt(1 / (2 * d))


def log_gain(d: int) -> float:
    """Start value of ``alpha``: exp(alpha) = √((2π - 1) / d), the ratio std(z_e) / E[z_e]."""
    return 0.5 * math.log((2 * math.pi - 1) / d)


@torch.no_grad()
def exponential_(weight: Tensor, mean: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``weight`` with draws from the exponential distribution of that mean; all are non-negative."""
    return weight.exponential_(1 / mean, generator=generator)


@torch.no_grad()
def inhibition_(Wix: Tensor, Wei: Tensor, Wex: Tensor, s: float, generator: torch.Generator | None = None) -> None:
    """Fill ``Wix`` and ``Wei`` so that Wei Wix averages the excitatory weights.

    One interneuron: Wix is the mean of the rows of ``Wex`` and Wei = 1, so subtraction is exact centring.
    Several: Wix ~ Exponential(s) and Wei = 1 / ni.
    """
    ni = len(Wix)
    if ni == 1:
        Wix.copy_(Wex.mean(0, keepdim=True))
    else:
        exponential_(Wix, s, generator)
    Wei.fill_(1 / ni)


@torch.no_grad()
def inhibition_iid_(Wix: Tensor, Wei: Tensor, s: float, generator: torch.Generator | None = None) -> None:
    """Fill ``Wix`` and ``Wei`` with independent draws of mean √(s / ni): the product Wei Wix has mean s."""
    mean = math.sqrt(s / len(Wix))
    exponential_(Wix, mean, generator)
    exponential_(Wei, mean, generator)


@torch.no_grad()
def inhibition_groups_(Wix: Tensor, Wei: Tensor, Wex: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill ``Wix`` and ``Wei`` so that each row of Wei Wix is exactly the mean row of ``Wex``, for any number ni.

    The rows of ``Wex`` are cut at random into ni groups G_k whose sizes differ by one at most: Wix_k is the mean of the
    rows in G_k, and Wei_ik = |G_k| / ne. One interneuron: as `inhibition_`.
    """
    ne = len(Wex)
    order = torch.randperm(ne, generator=generator, device=None if generator is None else generator.device)
    for k, group in enumerate(order.to(Wex.device).tensor_split(len(Wix))):
        Wix[k] = Wex[group].mean(0)
        Wei[:, k] = len(group) / ne
