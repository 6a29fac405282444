"""Learning rates of signed networks, in plain torch."""

from lightning_danns.optim.groups import (
    Correction,
    fisher_optimizer,
    fisher_param_groups,
    group_of_parameters,
    rehearse_scheduler,
    require_factors,
    scale_learning_rates_,
)
from lightning_danns.optim.ngd import DiagonalNGD, mean_squared_gradients
from lightning_danns.optim.steps import check_cosine_rule, clip_layers_, limit_clamping_

__all__ = [
    "Correction",
    "DiagonalNGD",
    "check_cosine_rule",
    "clip_layers_",
    "fisher_optimizer",
    "fisher_param_groups",
    "group_of_parameters",
    "limit_clamping_",
    "mean_squared_gradients",
    "rehearse_scheduler",
    "require_factors",
    "scale_learning_rates_",
]
