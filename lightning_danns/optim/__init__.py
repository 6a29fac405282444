"""Learning rates of signed networks, in plain torch."""

from lightning_danns.optim.groups import (
    Correction,
    fisher_optimizer,
    fisher_param_groups,
    rehearse_scheduler,
    require_factors,
    scale_learning_rates_,
)

__all__ = [
    "Correction",
    "fisher_optimizer",
    "fisher_param_groups",
    "rehearse_scheduler",
    "require_factors",
    "scale_learning_rates_",
]
