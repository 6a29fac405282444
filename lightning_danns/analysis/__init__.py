"""What Dale's networks do, and other networks made into them; plain torch."""

from lightning_danns.analysis.activity import activity
from lightning_danns.analysis.convert import Daleified, daleify
from lightning_danns.analysis.diagnostics import (
    LayerActivity,
    effective_rank,
    inspectable_layers,
    layer_diagnostics,
    projection_cosine,
    singular_value_entropy,
    weight_diagnostics,
)
from lightning_danns.analysis.nonnegativity import NonNegativity

__all__ = [
    "Daleified",
    "LayerActivity",
    "NonNegativity",
    "activity",
    "daleify",
    "effective_rank",
    "inspectable_layers",
    "layer_diagnostics",
    "projection_cosine",
    "singular_value_entropy",
    "weight_diagnostics",
]
