"""Learning rates of signed networks, in plain torch."""

from lightning_danns.optim.fisher import fisher_ratios, mean_squared_gradients, measured_factors
from lightning_danns.optim.groups import (
    Correction,
    change_factors_,
    fisher_optimizer,
    fisher_param_groups,
    group_of_parameters,
    rehearse_scheduler,
    require_factors,
    scale_learning_rates_,
)
from lightning_danns.optim.ngd import DiagonalNGD
from lightning_danns.optim.steps import check_cosine_rule, clip_layers_, limit_clamping_

__all__ = [
    "Correction",
    "DiagonalNGD",
    "change_factors_",
    "check_cosine_rule",
    "clip_layers_",
    "fisher_optimizer",
    "fisher_param_groups",
    "fisher_ratios",
    "group_of_parameters",
    "limit_clamping_",
    "mean_squared_gradients",
    "measured_factors",
    "rehearse_scheduler",
    "require_factors",
    "scale_learning_rates_",
]
