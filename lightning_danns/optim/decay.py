"""Weight decay that leaves excitation its inhibition: it draws weights together, not to 0."""

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_danns.layers.dale import dale_layers
from lightning_danns.optim.groups import DECAY_TO_INHIBITION, group_of_parameters


@torch.no_grad()
def decay_to_inhibition_(model: nn.Module, optimizer: Optimizer) -> None:
    """Add to gradients what draws excitatory weights to the inhibition that they meet:

        grad of Wex  <-  grad of Wex + lambda (Wex - Wei Wix)

    It is the gradient of lambda / 2 |Wex - Wei Wix|^2, inhibition held: the decay of an ordinary layer's weights, of
    the net weights. A unit in balance keeps its total excitation. Call it just before ``optimizer.step()``, on
    gradients that are not scaled; a `DaleLightningModule` with ``decay_to="inhibition"`` does so by itself.

    Args:
        model: its layers say what decays, and to what (`DaleModule.decays_to`).
        optimizer: its groups hold lambda, where `fisher_param_groups` with ``decay_to="inhibition"`` has put it.

    Example:
        >>> from lightning_danns import DANNLinear, fisher_param_groups
        >>> layer = DANNLinear(4, 3, 1, balanced=True)
        >>> groups = fisher_param_groups(layer, lr=0.1, weight_decay=0.01, decay_to="inhibition")
        >>> optimizer = torch.optim.SGD(groups)
        >>> layer(torch.rand(5, 4)).sum().backward()
        >>> decay_to_inhibition_(layer, optimizer)
    """
    rates = {
        parameter: group[DECAY_TO_INHIBITION]
        for parameter, group in group_of_parameters(optimizer).items()
        if DECAY_TO_INHIBITION in group
    }
    for _, layer in dale_layers(model) if rates else ():
        for name, target in layer.decays_to().items():
            weight = getattr(layer, name)
            if weight in rates and weight.grad is not None:
                weight.grad.add_(weight - target, alpha=rates[weight])
