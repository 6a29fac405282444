"""A start with strong excitation and inhibition that cancel, which leaves net weights room below 0."""

import math

import torch
from torch import nn

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import DaleModule, dale_layers


@torch.no_grad()
def strengthen_(model: nn.Module, factor: float = 2.0) -> None:
    """Make inhibition ``factor`` times as strong, and excitation by as much stronger: every z stays, but for rounding.

        Wex   <- Wex + (factor - 1) Wei Wix
        Wix   <- factor Wix
        alpha <- alpha - log(factor)

    A net weight Wex - Wei Wix can be no lower than -Wei Wix, where Wex meets 0. At the published start, where Wei Wix
    is about the standard deviation of Wex, many weights are close to that bound; this moves it away. Ordinary weight
    decay draws them back to it, ``decay_to="inhibition"`` does not (`decay_to_inhibition_`).

    Args:
        model: its layers say how they become stronger (`DaleModule.strengthen_`).
        factor: at least 1, which leaves the weights as they are.

    Raises:
        UsageError: a factor below 1 or not finite, a model without a layer that can become stronger, or one whose
            layers share weights.

    Example:
        >>> from lightning_danns import DANNLinear
        >>> layer, x = DANNLinear(9, 6, 2, balanced=True), torch.rand(5, 9)
        >>> before, z = layer.Wex.detach().sum(), layer(x)
        >>> strengthen_(layer, 2)
        >>> bool((layer(x) - z).abs().max() < 1e-4), round(float(layer.Wex.sum() / before), 3)
        (True, 2.0)
    """
    if not 1 <= factor < math.inf:
        raise UsageError(f"factor={factor}: excitation and inhibition can become stronger, by a finite factor from 1")
    able = [layer for _, layer in dale_layers(model) if type(layer).strengthen_ is not DaleModule.strengthen_]
    if not able:
        raise UsageError(f"{type(model).__name__} has no layer of excitation and inhibition that could be strengthened")
    owned = [parameter for layer in able for _, parameter in layer.nonnegative_parameters()]
    if len(set(owned)) < len(owned):
        raise UsageError("two layers of this model share weights, which cannot become stronger for each by itself")
    for layer in able:
        layer.strengthen_(factor)
