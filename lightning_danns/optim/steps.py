"""Two ways to keep one layer's step within bounds, both acting on gradients just before the optimizer's step."""

from collections import Counter

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_danns.errors import UsageError
from lightning_danns.layers.dale import dale_layers
from lightning_danns.optim.groups import DECAY_TO_INHIBITION, group_of_parameters


@torch.no_grad()
def clip_layers_(model: nn.Module, optimizer: Optimizer, max_norm: float) -> None:
    """Clip the gradient of each layer after its learning-rate factors: | (lr_scale * gradient) | <= ``max_norm``.

    A layer is a module with parameters of its own; the norm is over all of them. For SGD this equals scaling the
    gradients by the factors, clipping each layer's norm, and stepping with one rate.
    """
    groups = group_of_parameters(optimizer)
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.grad is not None and p in groups]
        scaled = {p: groups[p].get("lr_scale", 1.0) for p in own}
        if not scaled:
            continue
        norm = torch.stack([factor * p.grad.norm() for p, factor in scaled.items()]).norm()  # type: ignore[union-attr]
        shrink = (max_norm / (norm + 1e-6)).clamp(max=1)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
        for parameter in scaled:
            parameter.grad.mul_(shrink)  # type: ignore[union-attr]


def check_cosine_rule(epsilon: float, halvings: int) -> None:
    """Refuse what `limit_clamping_` cannot use."""
    if not 0 <= epsilon <= 1 or halvings < 0:
        raise UsageError(f"epsilon={epsilon}, halvings={halvings}: epsilon must be from 0 to 1, halvings at least 0")


@torch.no_grad()
def limit_clamping_(model: nn.Module, optimizer: Optimizer, epsilon: float, halvings: int = 10) -> dict[str, float]:
    """Shorten the step of each signed layer until clamping turns it little (the release's cosine rule).

    t' = t - lr * gradient are all the layer's parameters that must be >= 0, together, after the step and before they
    are clamped. The cosine of the angle by which clamping turns them is |max(t', 0)| / |t'|. The layer steps with the
    largest rate of the grid lr, lr / 2, ..., lr / 2^halvings for which that is at least 1 - epsilon, or with the
    smallest. Its free parameters (alpha, b) keep their ratio to the others.

    Args:
        model: holds the layers.
        optimizer: plain `torch.optim.SGD`, for which a smaller gradient is a smaller rate.
        epsilon: from 0 (no clamping) to 1.
        halvings: length of the grid.

    Returns:
        By layer, the fraction of the full rate that was chosen.

    Raises:
        UsageError: another optimizer, momentum or weight decay; epsilon out of range.
    """
    check_cosine_rule(epsilon, halvings)
    plain = ("momentum", "weight_decay", "maximize", DECAY_TO_INHIBITION)
    rules = [group.get(option) for group in optimizer.param_groups for option in plain]
    if not isinstance(optimizer, torch.optim.SGD) or any(rules):
        raise UsageError(
            f"the cosine rule predicts steps of plain SGD, not of {type(optimizer).__name__} with momentum, weight "
            "decay or other rules: use torch.optim.SGD with lr alone"
        )
    groups = group_of_parameters(optimizer)
    owners = Counter(p for _, layer in dale_layers(model) for p in layer.parameters(recurse=False))
    if any(count > 1 for count in owners.values()):
        raise UsageError("the cosine rule chooses one rate a layer, but two layers of this model share a parameter")
    chosen = {}
    for name, layer in dale_layers(model):
        signed = [p for _, p in layer.nonnegative_parameters() if p.grad is not None and p in groups]
        if not signed:
            continue
        for k in range(halvings + 1):
            after = [p - groups[p]["lr"] / 2**k * p.grad for p in signed]
            length = sum(t.square().sum() for t in after)
            clamped = sum(t.clamp(min=0).square().sum() for t in after)
            if clamped >= (1 - epsilon) ** 2 * length:
                break
        chosen[name] = 2.0**-k
        for parameter in layer.parameters(recurse=False):
            if parameter.grad is not None and parameter in groups:  # not what another optimizer steps
                parameter.grad.mul_(2.0**-k)
    return chosen
