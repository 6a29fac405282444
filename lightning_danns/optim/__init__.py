"""Learning rates of signed networks, in plain torch."""

from lightning_danns.optim.fisher import (
    Likelihood,
    categorical,
    fisher_ratios,
    mean_squared_gradients,
    measured_factors,
    reference_parameter,
)
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
    "Likelihood",
    "categorical",
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
    "reference_parameter",
    "rehearse_scheduler",
    "require_factors",
    "scale_learning_rates_",
]
