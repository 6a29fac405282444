"""Learning rates of signed networks, in plain torch."""

from lightning_danns.optim.groups import (
    Correction,
    fisher_optimizer,
    fisher_param_groups,
    rehearse_scheduler,
    require_factors,
    scale_learning_rates_,
)
from lightning_danns.optim.ngd import DiagonalNGD, mean_squared_gradients
from lightning_danns.optim.steps import clip_layers_, limit_clamping_

__all__ = [
    "Correction",
    "DiagonalNGD",
    "clip_layers_",
    "fisher_optimizer",
    "fisher_param_groups",
    "limit_clamping_",
    "mean_squared_gradients",
    "rehearse_scheduler",
    "require_factors",
    "scale_learning_rates_",
]
