"""Weight decay that leaves excitation its inhibition: it draws weights together, not to 0."""

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers
from lightning_danns.optim.groups import DECAY_TO_INHIBITION, group_of_parameters

KNOWN = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam),
    *(torch.optim.RMSprop, torch.optim.Adagrad),
)
"""Optimizers whose own decay is one of two kinds: added to the gradient, or, decoupled, a part of the weight."""


@torch.no_grad()
def decay_to_inhibition_(model: nn.Module, optimizer: Optimizer) -> None:
    """Draw excitatory weights to the inhibition that they meet, by the decay that an ordinary layer's weights have:

        grad of Wex  <-  grad of Wex + lambda (Wex - Wei Wix)      SGD, Adam and others that decay by the gradient
        Wex          <-  Wex - lr lambda (Wex - Wei Wix)           AdamW, and others with decoupled weight decay

    The first is the gradient of lambda / 2 |Wex - Wei Wix|^2, inhibition held. Under SGD and AdamW a unit in balance
    keeps its total excitation; Adam scales each weight's decay with its gradient. Call it just before
    ``optimizer.step()``, on gradients that are not scaled; a `DaleLightningModule` with ``decay_to="inhibition"`` does
    so by itself.

    Args:
        model: its layers say what decays, and to what (`DaleModule.decays_to`).
        optimizer: its groups hold lambda, where `fisher_param_groups` with ``decay_to="inhibition"`` has put it.

    Raises:
        UsageError: an optimizer whose way to decay is not known.

    Example:
        >>> from lightning_danns import DANNLinear, fisher_param_groups
        >>> layer = DANNLinear(4, 3, 1, balanced=True)
        >>> groups = fisher_param_groups(layer, lr=0.1, weight_decay=0.01, decay_to="inhibition")
        >>> optimizer = torch.optim.SGD(groups)
        >>> layer(torch.rand(5, 4)).sum().backward()
        >>> decay_to_inhibition_(layer, optimizer)
    """
    groups = {p: group for p, group in group_of_parameters(optimizer).items() if DECAY_TO_INHIBITION in group}
    if groups and not isinstance(optimizer, KNOWN):
        raise UsageError(
            f"decay_to='inhibition' does not know how {type(optimizer).__name__} decays weights: use one of "
            f"{', '.join(kind.__name__ for kind in KNOWN)}, or decay_to='zero'"
        )
    for _, layer in dale_layers(model) if groups else ():
        for name, target in layer.decays_to().items():
            weight = getattr(layer, name)
            if weight not in groups or weight.grad is None:
                continue
            group = groups[weight]
            rate = group[DECAY_TO_INHIBITION]
            if isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
                weight.lerp_(target, float(group["lr"]) * rate)
            else:
                weight.grad.add_(weight - target, alpha=-rate if group.get("maximize") else rate)
