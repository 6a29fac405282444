"""Learning rates of signed networks, in plain torch."""

from lightning_danns.optim.corrections import Correction, correction_of, factors_of, fisher, measured, none, steady
from lightning_danns.optim.decay import decay_to_inhibition_
from lightning_danns.optim.groups import (
    DECAY_TO_INHIBITION,
    DecayTo,
    change_factors_,
    fisher_optimizer,
    fisher_param_groups,
    group_of_parameters,
    require_factors,
)
from lightning_danns.optim.information import (
    Likelihood,
    categorical,
    fisher_ratios,
    mean_squared_gradients,
    measured_factors,
    reference_parameter,
)
from lightning_danns.optim.ngd import DiagonalNGD
from lightning_danns.optim.schedules import Sequential, WarmupCosine, rehearse
from lightning_danns.optim.steps import check_cosine_rule, clip_layers_, limit_clamping_

__all__ = [
    "DECAY_TO_INHIBITION",
    "Correction",
    "DecayTo",
    "DiagonalNGD",
    "Likelihood",
    "Sequential",
    "WarmupCosine",
    "categorical",
    "change_factors_",
    "check_cosine_rule",
    "clip_layers_",
    "correction_of",
    "decay_to_inhibition_",
    "factors_of",
    "fisher",
    "fisher_optimizer",
    "fisher_param_groups",
    "fisher_ratios",
    "group_of_parameters",
    "limit_clamping_",
    "mean_squared_gradients",
    "measured",
    "measured_factors",
    "none",
    "reference_parameter",
    "rehearse",
    "require_factors",
    "steady",
]
